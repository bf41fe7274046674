"""Explains out-of-memory errors: when memory ran out, and which setting to change next."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dora_dist.console.errors import ExpectedRunError

SIGNS = ("DefaultCPUAllocator: can't allocate memory", "out of memory")
"""Parts of messages of torch errors without a type of their own: from the CPU allocator, and from CUDA."""


class NoMemoryLeftError(ValueError):
    """A device ran out of memory. Raised on the rank where it happens."""


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Replaces an out-of-memory error in the block by one that says what to change.

    Args:
        advice: function that is called after such an error; returns when it happened and which settings to change.

    Raises:
        NoMemoryLeftError: memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # Another rank's report of its own memory error is not an error of this rank.
        told = isinstance(error, ExpectedRunError)
        if told or not (known or any(sign in str(error) for sign in SIGNS)):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise NoMemoryLeftError(f"no memory left {advice()} ({type(error).__name__}: {first_line})") from None
