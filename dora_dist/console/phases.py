"""What a command is doing, said whenever it takes long: a silent screen looks like a program that hangs."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from dora_dist.console.text import is_first_rank, num_said, say, time_span

QUIET_SECONDS = 10.0
"""Time without a remark after which the phase is said; it doubles with every time."""
LOOK_SECONDS = 1.0
_WITHOUT_NUMBERS = str.maketrans("", "", "0123456789")


class Phases:
    """Context in which the first rank says what it is doing, whenever nothing else has been said for a while.

    Phases that differ in their numbers only, as steps do, are one here.

    Args:
        phase: with which it begins.
        clock: seconds, for tests.

    Attributes:
        phase: what is being done, for messages; to be set by whoever begins something.
    """

    def __init__(self, phase: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = phase
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="phases", daemon=True)
        self._kind = ""
        self._began = self._quiet_since = 0.0
        self._wait = QUIET_SECONDS
        self._said = num_said()

    def __enter__(self) -> Self:
        if is_first_rank():
            self.look()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Say the phase if it is time to; to be called again and again."""
        now, phase = self._clock(), self.phase
        if (kind := phase.translate(_WITHOUT_NUMBERS)) != self._kind:
            self._kind, self._began, self._wait = kind, now, QUIET_SECONDS
            self._quiet_since = now
        elif num_said() != self._said:
            self._quiet_since = now
        elif now - self._quiet_since >= self._wait:
            with tqdm.external_write_mode(file=sys.stderr):  # not into the middle of a bar
                say(f"still in: {phase} ({time_span(now - self._began)})")
            self._wait *= 2
            self._quiet_since = now
        self._said = num_said()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()
