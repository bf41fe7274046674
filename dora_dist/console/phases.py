"""Reports what a command is doing whenever that takes long, so that it does not seem to hang."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from dora_dist.console.text import is_first_rank, num_said, say, time_span

QUIET_SECONDS = 10.0
"""Time without output after which the phase is reported; it doubles with every report."""
LOOK_SECONDS = 1.0
_WITHOUT_NUMBERS = str.maketrans("", "", "0123456789")


class Phases:
    """Context in which the first rank reports the current phase whenever nothing has been printed for a while.

    Phases that differ only in numbers, such as steps, count as one.

    Args:
        phase: the first phase.
        clock: returns seconds; replaced in tests.

    Attributes:
        phase: the current phase, for messages; set by the code that begins it.
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
        """Report the phase if it is time to; must be called repeatedly."""
        now, phase = self._clock(), self.phase
        if (kind := phase.translate(_WITHOUT_NUMBERS)) != self._kind:
            self._kind, self._began, self._wait = kind, now, QUIET_SECONDS
            self._quiet_since = now
        elif num_said() != self._said:
            self._quiet_since = now
        elif now - self._quiet_since >= self._wait:
            with tqdm.external_write_mode(file=sys.stderr):  # not in the middle of a progress bar
                say(f"still in: {phase} ({time_span(now - self._began)})")
            self._wait *= 2
            self._quiet_since = now
        self._said = num_said()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()
