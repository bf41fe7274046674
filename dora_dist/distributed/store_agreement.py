"""Agreement of ranks that share a key-value store but no process group."""

import pickle
import time
from typing import Any

import torch
import torch.distributed as dist

from dora_dist.distributed.agreement import Agreement, RankFailedError

POLL_SECONDS = 0.02
"""Time between two looks into the store."""


class StoreAgreement(Agreement):
    """An :class:`Agreement` whose gather, and everything built on it, does not use the backend's collectives.

    Values go through the store at which the ranks met. So ranks can still tell each other what is wrong if NCCL does
    not work, and ranks that do not answer are named. It is slower than a collective, and for a few small values.

    Args:
        device: see :class:`Agreement`.
        timeout_seconds: longest time that the slowest rank may take.
    """

    SLACK_SECONDS = 5.0
    """Time that other ranks wait longer than rank 0, which tells them who is missing."""

    def __init__(self, device: torch.device | str, timeout_seconds: float) -> None:
        super().__init__(device)
        self._timeout_seconds = timeout_seconds
        self._gathers = 0
        # torch has no public name for it; a second store would need a port of its own, open between all nodes.
        store: Any = dist.distributed_c10d._get_default_store() if self.distributed else None
        self._store = store

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on every rank. Values must pickle; for small things only.

        Raises:
            RankFailedError: ranks did not answer in time (the message names them), or the store is gone.
        """
        if self._store is None:
            return [value]
        self._gathers += 1
        prefix = f"agreement/{self._gathers}"
        end = time.monotonic() + self._timeout_seconds
        missing: list[int] = [0]  # unless rank 0 answers
        values: list[Any] = []
        try:
            self._store.set(f"{prefix}/{self.rank}", pickle.dumps(value))
            if self.is_first:
                missing, values = self._collect(prefix, end)
                self._store.set(f"{prefix}/all", pickle.dumps((missing, values)))
            elif self._arrives(f"{prefix}/all", end + self.SLACK_SECONDS):
                missing, values = pickle.loads(self._store.get(f"{prefix}/all"))
        except dist.DistError as error:
            raise RankFailedError(f"the store at which the ranks met, which rank 0 keeps, has gone: {error}") from None
        if missing:
            named = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            raise RankFailedError(f"{named} of {self.size} did not answer within {self._timeout_seconds:g} s")
        return values

    def _collect(self, prefix: str, end: float) -> tuple[list[int], list[Any]]:
        """Ranks that have stored nothing under ``prefix`` by the time ``end``; and, if there are none, all values by
        rank."""
        keys = [f"{prefix}/{rank}" for rank in range(self.size)]
        missing = [rank for rank, key in enumerate(keys) if not self._arrives(key, end)]
        return missing, [] if missing else [pickle.loads(self._store.get(key)) for key in keys]

    def _arrives(self, key: str, end: float) -> bool:
        """Wait for a key until the time ``end``, and return whether it is there. Waits in short pieces, between which
        Ctrl-C is handled."""
        while not self._store.check([key]):
            if time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def close(self) -> None:
        """Leave when all ranks have come here, rank 0 last: it may keep the store that others still read."""
        if self._store is not None:
            self._store.set(f"agreement/left/{self.rank}", pickle.dumps(None))
            if self.is_first:
                self._collect("agreement/left", time.monotonic() + self._timeout_seconds)
