"""The most memory that this process takes while something runs, above what it took before."""

import gc
import threading
import time
from pathlib import Path
from types import TracebackType

SECONDS_BETWEEN = 0.002


class MemoryWatch:
    """Context that measures the memory of what runs within it.

    Attributes:
        resident: growth of all resident memory at its peak, in bytes: pages of mapped files count, also where other
            processes share them. Counted by Linux itself, nothing is missed.
        anonymous: growth of the process's own memory (not of files) at its peak, in bytes; sampled.
        kept: growth of the process's own memory at the end, in bytes.
        seconds: duration in seconds.
        processor_seconds: processor time of all threads of the process, which other processes on the machine hardly
            change.
    """

    resident = anonymous = kept = 0
    seconds = processor_seconds = 0.0

    def __enter__(self) -> "MemoryWatch":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self._before = read_memory()
        self._highest = self._before["RssAnon"]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._started, self._started_processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._started
        self.processor_seconds = time.process_time() - self._started_processor
        self._done.set()
        self._thread.join()
        after = read_memory()
        self.resident = after["VmHWM"] - self._before["VmRSS"]
        self.anonymous = max(self._highest, after["RssAnon"]) - self._before["RssAnon"]
        self.kept = after["RssAnon"] - self._before["RssAnon"]

    def _sample(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN):
            self._highest = max(self._highest, read_memory()["RssAnon"])


def read_memory() -> dict[str, int]:
    """``VmRSS``, ``VmHWM``, ``RssAnon`` and the like of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}
