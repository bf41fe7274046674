"""Memory that a start from data or ranks from data take on one device, before the engine and its optimizer exist.

Rows go through the model one at a time (:mod:`dora_dist.training.from_data.passes`), with hooks on the layers, so that
gated MLPs run by their own forward.
"""

from dataclasses import replace

from dora_dist.base_model.shape import ModelShape
from dora_dist.config.adapter import GRADIENT, INPUTS, LORA_ONE, RANKS_FROM_DATA, WEIGHT_GRADIENT
from dora_dist.memory.activations import FLOAT32, read_together
from dora_dist.memory.step import MemoryInstant, TrainingStep, at_loss, base_parts, decoder_memory, in_backward
from dora_dist.method.ranks import LARGEST_GRADIENT, groups_within
from dora_dist.method.subspaces import EXTRA_PROBES

NAMES = dict.fromkeys(RANKS_FROM_DATA, "ranks from data")
NAMES |= dict.fromkeys((INPUTS, GRADIENT, LORA_ONE), "start from data")


def at_start(step: TrainingStep, made: str) -> MemoryInstant:
    """The peak of memory while a start from data or ranks from data are made, without an engine.

    Args:
        step: the run's training step, but with a batch of one row.
        made: value of ``adapter.init`` (``inputs``, ``gradient`` or ``lora_one``) or of ``adapter.ranks``
            (``gradient_spectrum`` or ``weight_gradient``). The result for ``inputs`` is an upper bound.
    """
    blocks = tuple(replace(block, fused_mlp=False) for block in step.shape.blocks)
    optimizer = replace(step.optimizer, engine="none", gradients_between=False)
    adapter = replace(step.adapter, penalty=False)
    step = replace(step, shape=replace(step.shape, blocks=blocks), optimizer=optimizer, adapter=adapter)
    resident = {
        **base_parts(step.shape, step.quantization, step.batch.compute_bytes, step.shards),
        "adapter": adapter.nbytes(step.shape),
        "directions": _dense(step.shape) if made == WEIGHT_GRADIENT else _directions(step.shape, made),
    }
    if made == INPUTS:
        step = replace(step, recomputed=len(blocks))
    layers = decoder_memory(step)
    instants = [at_loss(step, resident, layers), *in_backward(step, resident, layers)]
    if made == INPUTS:
        # Nothing is kept for a backward; one layer's activations exist, as when a layer is computed again.
        instants = [_without(instant, layers.kept) for instant in instants]
    most = max(instants, key=lambda instant: instant.total)
    return MemoryInstant(name=NAMES[made], parts={**most.parts, "tokens in float32": _copies(step, made)})


def _without(instant: MemoryInstant, kept: int) -> MemoryInstant:
    activations = max(0, instant.parts.get("activations", 0) - kept)
    return replace(instant, parts={**instant.parts, "activations": activations})


def _dense(shape: ModelShape) -> int:
    """Bytes of the gradients of a group of layers, and of one weight of the largest layer."""
    adapted = [linear for linear in shape.linears if linear.adapted]
    sizes = {str(number): linear.numel for number, linear in enumerate(adapted)}
    groups = groups_within(sizes, LARGEST_GRADIENT)
    return FLOAT32 * (max(sum(sizes[name] for name in group) for group in groups) + max(sizes.values()))


def _directions(shape: ModelShape, init: str) -> int:
    """Bytes of the probes, and of the products that a pass adds up. For ``inputs``, both are as wide as the inputs, one
    set for layers that share an input; otherwise, one is as wide as a layer's inputs, the other as its outputs."""
    if init != INPUTS:
        return FLOAT32 * sum(
            (linear.rank + EXTRA_PROBES) * (linear.in_features + linear.out_features)
            for linear in shape.linears
            if linear.adapted
        )
    numel = 0
    for block in shape.blocks:
        for together in read_together(block, [linear for linear in block.linears if linear.adapted]):
            numel += (max(linear.rank for linear in together) + EXTRA_PROBES) * together[0].in_features
    return 2 * FLOAT32 * numel


def _copies(step: TrainingStep, init: str) -> int:
    """Bytes of float32 copies of the widest layer's input and output gradient, for their products with the probes."""
    if step.batch.compute_bytes == FLOAT32:
        return 0
    widths = [
        linear.in_features + (linear.out_features if init != INPUTS else 0)
        for linear in step.shape.linears
        if linear.adapted
    ]
    return FLOAT32 * step.batch.tokens * max(widths)
