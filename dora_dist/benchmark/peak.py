"""Measures the peak memory of steps in bytes: by the allocator's counters on a GPU, by its events on a CPU."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def live_storages() -> dict[int, int]:
    """Address -> bytes, for the storage of every CPU tensor that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor) or thing.device.type != "cpu":
            continue
        # Fake ones, which torch keeps in caches of its own, have no memory. Those made of other tensors, such as one of
        # which ranks hold shards, have that of these.
        if not isinstance(thing, FakeTensor) and not is_traceable_wrapper_subclass(thing):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)
    return storages


@contextmanager
def rise_of_allocator() -> Iterator[SimpleNamespace]:
    """Measures how far the allocated CPU bytes rise above those at the start (``peak``), and the largest single
    allocation (``largest``), by the allocator's own events.

    Memory that a kernel allocates and frees within one operation is counted. Scratch memory of MKL or oneDNN, which is
    outside the allocator, is not.
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
    """:func:`rise_of_allocator` for any device; on a GPU, whose counters do not show it, ``largest`` is None."""
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
    """Measures the peak memory of steps on a device, including everything made after this object.

    Args:
        device: device of the steps.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._allocated = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self._storages = live_storages()

    def of_second(self, step: Callable[[], object]) -> int:
        """Take two steps, and return the peak of the second, resident tensors included. The second step has the
        optimizer's state from the start."""
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
    """A function that waits for the device's pending work and returns the time in seconds."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
