"""The rendezvous of the ranks of a run, before and beside the process group.

It is the key-value store of torch's rendezvous, under a prefix of its own. No collective takes part, so that a rank
can ask it who is there while its collectives hang.
"""

import os
import platform
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from dora_dist.console.errors import ExpectedRunError
from dora_dist.console.text import ranges
from dora_dist.distributed.launcher import world_size_of

POLL_SECONDS = 0.2
ANSWER_TIMEOUT = timedelta(seconds=20)
"""Longest time that the store may take to answer once the ranks are connected."""


_KEPT: list[Any] = []
"""Keeps the store alive until this process ends: other ranks may still read it."""


class JoinError(ExpectedRunError):
    """Some ranks did not connect in time. Raised on every rank that did."""


@dataclass(frozen=True)
class Rendezvous:
    """The rendezvous of a run, once all ranks have connected.

    Attributes:
        rank: rank of this process.
        size: number of ranks.
        place: host and port of the store, which rank 0 (or its launcher) keeps.
    """

    rank: int
    size: int
    place: tuple[str, int]
    _prefix: str

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, which collects the others' answers."""
        return self.rank == 0

    def connect(self) -> Any:
        """A separate connection to the store, for use by one thread.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        host, port = self.place
        client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=ANSWER_TIMEOUT)
        return PrefixStore(self._prefix, client)

    def node_of(self, store: Any, rank: int) -> str:
        """Host name of a rank."""
        node: str = store.get(_joined(rank)).decode()
        return node


def join_rendezvous(seconds: float, knob: str) -> Rendezvous | None:
    """Wait until all ranks of the launch have connected; None if this process is alone.

    Args:
        seconds: longest time to wait.
        knob: the key or option that sets it, for messages.

    Raises:
        JoinError: some ranks did not connect in time, or rank 0 cannot be reached.
    """
    size = world_size_of(os.environ)
    if size == 1:
        return None
    rank = int(os.environ["RANK"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher that restarts its ranks meets at the same place again. (Of several launchers, each counts for itself.)
    prefix = f"dora_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    launcher_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    found = Rendezvous(rank, size, (host, port), prefix)
    keeps_it = found.is_first and not launcher_keeps_it
    try:
        server = TCPStore(
            host,
            port,
            is_master=keeps_it,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
            multi_tenant=True,  # the process group of this process will use the same one
        )
    except RuntimeError as error:
        raise JoinError(_explain(error, rank, (host, port), keeps_it, f"{seconds:g} s ({knob})")) from None
    store = PrefixStore(prefix, server)
    store.set(_joined(rank), platform.node())
    store.set(beat_key(rank), "0 starting")
    missing = _wait_for_all(store, size, seconds) if found.is_first else _ask(store, seconds)
    if missing:
        raise JoinError(
            f"{missing} did not connect to {host}:{port} within {seconds:g} s ({knob}). Check the logs of "
            "the missing ranks or nodes, and that all ranks have the same MASTER_ADDR and MASTER_PORT"
        )
    _KEPT.append(server)
    return found


def _wait_for_all(store: Any, size: int, seconds: float) -> str:
    """On rank 0: wait for all ranks, and tell the others and return which ranks are missing; empty if none."""
    end = time.monotonic() + seconds
    missing = list(range(size))
    while missing and time.monotonic() < end:
        missing = [rank for rank in missing if not store.check([_joined(rank)])]
        if missing:
            time.sleep(POLL_SECONDS)
    here = [f"rank {rank} ({store.get(_joined(rank)).decode()})" for rank in range(size) if rank not in missing]
    text = f"rank{'s' * (len(missing) > 1)} {ranges(missing)} of {size}" if missing else ""
    if missing and len(here) <= 8:
        text += f" (connected: {', '.join(here)})"
    store.set("met", text)
    return text


def _ask(store: Any, seconds: float) -> str:
    """On the other ranks: the missing ranks, according to rank 0; empty if none."""
    # Rank 0 may come last, and begins to wait only then. Waits in short pieces, between which signals are handled.
    end = time.monotonic() + 2 * seconds
    try:
        while not store.check(["met"]):
            if time.monotonic() > end:
                return "rank 0"
            time.sleep(POLL_SECONDS)
        answer: str = store.get("met").decode()
    except RuntimeError:
        return "rank 0"
    return answer


def _explain(error: RuntimeError, rank: int, place: tuple[str, int], keeps_it: bool, waited: str) -> str:
    host, port = place
    reason = str(error).splitlines()[0]
    if keeps_it and ("address already in use" in reason.lower() or "EADDRINUSE" in reason):
        return (
            f"port {port} of {platform.node()} is in use: set another MASTER_PORT (accelerate launch "
            "--main_process_port)"
        )
    return f"rank {rank} ({platform.node()}) could not reach rank 0 at {host}:{port} within {waited}: {reason}"


def beat_key(rank: int) -> str:
    """Key of a rank's heartbeat (:mod:`dora_dist.distributed.heartbeat`)."""
    return f"sign/{rank}"


def _joined(rank: int) -> str:
    return f"joined/{rank}"
