"""The peak memory of steps, in bytes: from the allocator's counters on a GPU, from its events on a CPU."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def live_storages() -> dict[int, int]:
    """Address and bytes of the storage of every tensor on the CPU that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)
    return storages


@contextmanager
def rise_of_allocator() -> Iterator[SimpleNamespace]:
    """How far the allocated bytes on the CPU rise, at most, above those at the start (``peak``), and the largest
    single allocation (``largest``), by the events of the allocator itself.

    What a kernel allocates and frees within one operation counts; scratch of MKL or oneDNN, outside the allocator,
    does not.
    """
    found = SimpleNamespace(peak=0, largest=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        found.peak = max(found.peak, live)
        found.largest = max(found.largest, event.nbytes())


@contextmanager
def rise_on(device: torch.device) -> Iterator[SimpleNamespace]:
    """:func:`rise_of_allocator` for any device; a GPU's counters do not tell the largest allocation, which is None."""
    if device.type != "cuda":
        with rise_of_allocator() as found:
            yield found
        return
    found = SimpleNamespace(peak=0, largest=None)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    torch.cuda.synchronize(device)
    found.peak = torch.cuda.max_memory_allocated(device) - before


class PeakMeter:
    """The peak of steps on a device, with everything that was made after this object.

    Args:
        device: on which the steps compute.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._allocated = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self._storages = live_storages()

    def of_second(self, step: Callable[[], object]) -> int:
        """Take two steps; the peak of the second, which has the optimizer's state from the start, resident tensors
        included."""
        step()
        resident = self._resident()
        with rise_on(self.device) as found:
            step()
        rise: int = found.peak
        return resident + rise

    def _resident(self) -> int:
        if self.device.type == "cuda":
            gc.collect()
            return torch.cuda.memory_allocated(self.device) - self._allocated
        return sum(size for address, size in live_storages().items() if address not in self._storages)


def clock(device: torch.device) -> Callable[[], float]:
    """A function that waits until the device has done what it was given, and reads the time."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
