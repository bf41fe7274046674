"""Explains out-of-memory errors: when memory ran out, and which setting to change next."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dora_dist.base_model.recomputation import Recomputation
from dora_dist.console.errors import ExpectedRunError

SIGNS = ("DefaultCPUAllocator: can't allocate memory", "out of memory")
"""Parts of messages of torch errors without a type of their own: from the CPU allocator, and from CUDA."""
LOADING_ADVICE = (
    "while loading the model, so it does not fit at all: set model.quantization to nf4, choose a smaller model, or use "
    "a device with more memory that no other process uses"
)
EVALUATION_ADVICE = "in an evaluation: lower training.per_device_eval_batch_size, or evaluation.max_new_tokens"


class NoMemoryLeftError(ValueError):
    """A device ran out of memory. Raised on the rank where it happens."""


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Replaces an out-of-memory error in the block by one that says what to change.

    Args:
        advice: called after such an error; returns when it happened and which settings to change.

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


def step_advice(step: int, recomputation: Recomputation, rows: int, accumulation: int) -> str:
    """Settings to change after memory ran out in an optimizer step, the cheapest first.

    Args:
        step: number of the step, from 1.
        recomputation: which layers are recomputed.
        rows: rows of a micro-batch on one device.
        accumulation: micro-batches of an optimizer step.
    """
    settings = []
    count, layers = recomputation.count, recomputation.layers
    if count < layers:
        more = min(layers, count + math.ceil(layers / 4))
        settings.append(f"--model.recompute_layers {'all' if more == layers else f'{more}, then all'}")
    if rows > 1:
        fewer = max(divisor for divisor in range(1, rows) if rows % divisor == 0)
        settings.append(
            f"--training.per_device_train_batch_size {fewer} "
            f"--training.gradient_accumulation_steps {accumulation * rows // fewer}, which is the same global batch"
        )
    settings.append("a smaller --data.max_length")
    now = f"{recomputation} layers are recomputed, a micro-batch has {rows} row{'s' * (rows > 1)}"
    return f"in step {step}, where {now}. Set, until it fits: {'; '.join(settings)}"
