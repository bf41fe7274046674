"""Which setting to change next after memory ran out, for :func:`~dora_dist.distributed.out_of_memory.explained`."""

import math

from dora_dist.base_model.recomputation import Recomputation

LOADING_ADVICE = (
    "while loading the model, so it does not fit at all: set model.quantization to nf4, choose a smaller model, or use "
    "a device with more memory that no other process uses"
)


def step_advice(step: int, recomputation: Recomputation, rows: int, accumulation: int) -> str:
    """Settings to change after memory ran out in an optimizer step, the cheapest first.

    Args:
        step: number of the step, counted from 1.
        recomputation: the layers that are recomputed.
        rows: number of rows of a micro-batch on one device.
        accumulation: number of micro-batches of an optimizer step.
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
