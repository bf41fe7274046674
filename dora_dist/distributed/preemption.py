"""Records SIGTERM and SIGUSR1: a run is about to lose its machines.

The program serves a recorded signal at the end of the optimizer step, by one decision of all ranks and a complete
checkpoint; before training, at the next phase that all ranks end together. docs/reliability.md, "Preemption", says what
a user sees of it, under every launcher.

A rank that hangs, in a collective whose other end has died, does not end at the launcher's SIGTERM any more, but with
the verdict of :mod:`dora_dist.distributed.heartbeat`.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from dora_dist.console.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionNotice:
    """Context in which :data:`SIGNALS` are recorded instead of ending the process. For the main thread only.

    It restores the former handlers when it is left, except by a :class:`~dora_dist.console.errors.PreemptedError`:
    then the signals are ignored from there on. A launcher that sees the first rank exit sends SIGTERM to the others,
    which must not change their exit status.

    Processes that are forked in it (those that read or encode data) are not part of the decision: SIGTERM ends them, as
    their parent expects of it, and SIGUSR1, which a batch system may send to all processes of a job, does nothing.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._repeated = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionNotice":
        self._former = {number: signal.signal(number, self._record) for number in SIGNALS}
        os.register_at_fork(after_in_child=self._release_child)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_IGN if isinstance(error, PreemptedError) else former)
        self._former = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received = name
            _write(
                f"received {name}: stopping at the end of this step with a checkpoint, "
                "unless training has not begun or is over"
            )
        elif not self._repeated:
            self._repeated = True
            _write(f"received {name} too: it changes nothing, {self.received} is being served")

    def _release_child(self) -> None:
        if self._former:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _write(text: str) -> None:
    rank = os.environ.get("RANK")
    who = f"[rank {rank}] " if rank is not None else ""
    # Not sys.stderr: a handler may run in the middle of another write to it, which Python refuses.
    os.write(2, f"{who}{text}\n".encode())
