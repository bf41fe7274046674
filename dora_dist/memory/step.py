"""Memory that a training step takes on one device, by arithmetic: nothing is loaded and nothing is run.

Shapes come from a model on the meta device; everything else is plain numbers. All results are bytes. The engines' needs
were read from the source of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py) and torch 2.13 (DistributedDataParallel).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dora_dist.base_model.chunked_loss import chunk_length
from dora_dist.base_model.shape import Block, Linear, ModelShape
from dora_dist.memory.activations import (
    FLOAT32,
    NF4_BLOCK,
    Adapter,
    Batch,
    BlockMemory,
    SideBySide,
    block_memory,
    kept_int8_inputs,
)

NF4_NESTED_BLOCK = 256
"""Number of constants that share a constant (double quantization)."""
NF4_TABLE = 16 * FLOAT32
"""Bytes per weight: the 16 values of NF4."""
NESTED_TABLE = 256 * FLOAT32 + FLOAT32
"""Bytes per weight with double quantization: the 256 values of its constants' code, and their offset."""
ZERO_ALIGNMENT = 2
"""DeepSpeed pads its flat buffers to a multiple of this per rank (``nccl_start_alignment_factor``)."""
GATHERED_LAYERS = 3
"""Layers of a sharded base whose whole size a rank holds at a time: the weights of the layer that is computed, and the
buffers in which it and the next one are gathered. By torch's code (FSDP2 of 2.13); not measured on a GPU."""
KEPT_LAYER = "backward of a decoder layer"
RECOMPUTED_LAYER = "backward of a recomputed layer"


def base_parts(shape: ModelShape, quantization: str, compute_bytes: int, shards: int = 1) -> dict[str, int]:
    """Bytes of the frozen base by part, on one rank.

    Args:
        shape: the model's shape.
        quantization: ``nf4``, ``int8`` or ``none``; the output head is never quantized.
        compute_bytes: bytes per element of unquantized weights.
        shards: number of ranks that share the weights of the layers (``distributed.shard_base``). Everything else is
            whole on each rank, and so are :data:`GATHERED_LAYERS` at a time.
    """
    inner = [linear for linear in shape.linears if not linear.unquantized]
    if quantization == "nf4":
        weights = {"4-bit weights": sum(math.ceil(linear.numel / 2) for linear in inner)}
        constants = sum(_nf4_constants(linear) for linear in inner)
    elif quantization == "int8":
        weights = {"8-bit weights": sum(linear.numel for linear in inner)}
        constants = sum(FLOAT32 * linear.out_features for linear in inner)
    else:
        weights = {"linear weights": compute_bytes * sum(linear.numel for linear in inner)}
        constants = 0
    if shards > 1:
        ((name, whole),) = weights.items()
        gathered = min(whole, math.ceil(GATHERED_LAYERS * whole / max(1, len(shape.blocks))))
        weights = {f"{name}, in {shards} shards": math.ceil(whole / shards), "gathered layers": gathered}
    return {
        **weights,
        "quantization constants": constants,
        "embeddings and head": compute_bytes * shape.embedding_numel,
        "norms and others": compute_bytes * shape.other_numel + shape.buffer_bytes,
    }


def _nf4_constants(linear: Linear) -> int:
    blocks = math.ceil(linear.numel / NF4_BLOCK)
    if linear.plain_constants:
        return FLOAT32 * blocks + NF4_TABLE
    return blocks + FLOAT32 * math.ceil(blocks / NF4_NESTED_BLOCK) + NF4_TABLE + NESTED_TABLE


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Numbers of the optimizer and the engine.

    Args:
        engine: ``zero2``, ``ddp`` or ``none``.
        world_size: number of ranks.
        moments: number of state values per trained element (2 for Adam).
        moment_bytes: bytes of such a value; None for those of the dtype that is optimized.
        scratch: number of copies of one rank's optimized elements that the update needs.
        bucket_numel: number of elements in DeepSpeed's reduction buffer (``reduce_bucket_size``).
        gradients_between: whether gradients of an earlier micro-batch exist when the next one begins.
    """

    engine: Literal["zero2", "ddp", "none"]
    world_size: int
    moments: int = 2
    moment_bytes: int | None = None
    scratch: int = 1
    bucket_numel: int = 50_000_000
    gradients_between: bool = False

    @property
    def sharded(self) -> bool:
        """Whether ZeRO spreads gradients and optimizer state over the ranks."""
        return self.engine == "zero2"

    def shard_numel(self, numel: int) -> int:
        """Number of elements that one rank optimizes."""
        if not self.sharded:
            return numel
        return ZERO_ALIGNMENT * math.ceil(numel / (ZERO_ALIGNMENT * self.world_size))

    def parts(self, numel: int, element_bytes: int) -> dict[str, int]:
        """Bytes that stay between steps, by part.

        Args:
            numel: number of trained elements of the whole adapter.
            element_bytes: bytes per element of the adapter.
        """
        shard = self.shard_numel(numel)
        optimized = FLOAT32 if self.sharded else element_bytes
        moments = shard * self.moments * (optimized if self.moment_bytes is None else self.moment_bytes)
        return {
            "float32 master copy": shard * FLOAT32 if self.sharded else 0,
            "optimizer moments": moments,
            # DDP reduces in copies of the gradients, unless they are views of its buckets.
            "gradient buckets": numel * element_bytes if self.engine == "ddp" else 0,
        }


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Everything that the memory of a training step depends on.

    Args:
        shape: the model's shape.
        quantization: ``nf4``, ``int8`` or ``none``.
        batch: one micro-batch on one device.
        adapter: the adapter's numbers.
        optimizer: numbers of the optimizer and the engine.
        recomputed: number of decoder layers that are computed again in the backward, the first ones.
        chunked_loss: whether the loss is computed without the logits of all positions.
        shards: number of ranks that share the weights of the layers.
        new_rows: number of trained elements in the rows of new tokens, in embedding and head.
    """

    shape: ModelShape
    quantization: str
    batch: Batch
    adapter: Adapter
    optimizer: Optimizer
    recomputed: int
    chunked_loss: bool = True
    shards: int = 1
    new_rows: int = 0

    @property
    def trained_numel(self) -> int:
        """Number of elements of the adapter, and of rows of new tokens, that have a gradient."""
        return self.adapter.trained_numel(self.shape) + self.new_rows

    @property
    def shard_numel(self) -> int:
        """Number of trained elements that one rank optimizes."""
        return self.optimizer.shard_numel(self.trained_numel)

    @property
    def hidden_numel(self) -> int:
        """Number of elements of the micro-batch's hidden states."""
        return self.batch.tokens * self.shape.hidden_size


@dataclass(frozen=True, kw_only=True)
class MemoryInstant:
    """Memory at one instant of a step, by part, in bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of a training step, in bytes.

    Args:
        resident: memory that stays allocated all the time, by part.
        activations: activations that the backward needs when it begins.
        recomputed: activations of a decoder layer while it is computed again; 0 if none is.
        instants: the instants at which memory can be at its peak.
        approximate: whether the decoder layers are routed, or not built like Llama's, so that their activations are a
            guess.
    """

    resident: Mapping[str, int]
    activations: int
    recomputed: int
    instants: Sequence[MemoryInstant]
    approximate: bool = False

    @property
    def peak(self) -> MemoryInstant:
        return max(self.instants, key=lambda instant: instant.total)


def loss_memory(tokens: int, vocabulary: int) -> int:
    """Bytes of the cross-entropy over float32 logits of all positions at its peak, in its backward.

    Three float32 tensors of (tokens, vocabulary) exist: the log-probabilities, their gradient, and that of the logits.
    (The forward needs no more: the logits in the compute dtype and in float32, and the log-probabilities.)
    """
    return 3 * FLOAT32 * tokens * vocabulary


def chunked_loss_memory(tokens: int, vocabulary: int, hidden_size: int, compute_bytes: int) -> int:
    """Bytes of the cross-entropy by chunks (:mod:`dora_dist.base_model.chunked_loss`) at its peak, in its forward.

    These exist: the head's input and its gradient of (tokens, hidden_size) and, for one chunk, the logits in float32,
    the logits or their gradient in the compute dtype, and the gradient of the head's input.
    """
    chunk = min(tokens, chunk_length(vocabulary))
    logits = FLOAT32 if compute_bytes == FLOAT32 else FLOAT32 + compute_bytes
    return chunk * vocabulary * logits + (2 * tokens + chunk) * hidden_size * compute_bytes


def step_memory(step: TrainingStep) -> StepMemory:
    """Memory of a training step: the resident parts, the activations, and the instants that can be the peak."""
    resident = {
        **base_parts(step.shape, step.quantization, step.batch.compute_bytes, step.shards),
        "adapter": step.adapter.nbytes(step.shape) + step.new_rows * step.adapter.bytes_per_element,
        **step.optimizer.parts(step.trained_numel, step.adapter.bytes_per_element),
    }
    layers = decoder_memory(step)
    return StepMemory(
        resident=resident,
        activations=layers.kept,
        recomputed=layers.recomputed,
        instants=(at_loss(step, resident, layers), *in_backward(step, resident, layers), at_update(step, resident)),
        approximate=not all(block.is_known for block in step.shape.blocks) or not step.shape.blocks,
    )


@dataclass(frozen=True, kw_only=True)
class LayerBackward:
    """Memory at the peak of the backward of one decoder layer, in bytes.

    Args:
        activations: activations of the layer, and those kept for the layers before it.
        temporaries: need of its backward beyond them, without ``dequantized``.
        dequantized: largest dequantized weight at that point.
        gradients: gradients of the components of the layers after it.
    """

    activations: int
    temporaries: int
    dequantized: int
    gradients: int

    @property
    def total(self) -> int:
        return self.activations + self.temporaries + self.dequantized + self.gradients


@dataclass(frozen=True, kw_only=True)
class DecoderMemory:
    """Activations of all decoder layers together, in bytes.

    Args:
        kept: activations that the backward needs when it begins: the inputs of the layers that are recomputed, and all
            saved activations of the others.
        recomputed: activations of the layer that is being recomputed.
        gradients: gradients of the components of all layers, when the backward has left them.
        of_kept: backward of a layer that is not recomputed, at the one with the highest peak; None if there is none.
        of_recomputed: the same for the layers that are recomputed.
    """

    kept: int
    recomputed: int
    gradients: int
    of_kept: LayerBackward | None
    of_recomputed: LayerBackward | None


def decoder_memory(step: TrainingStep) -> DecoderMemory:
    """Activations of the decoder layers, from those of each layer."""
    shape, batch = step.shape, step.batch
    blocks = [block_memory(block, shape, batch, step.adapter, step.quantization) for block in shape.blocks]
    again, others = blocks[: step.recomputed], blocks[step.recomputed :]
    checkpoints = [_checkpoint(step, block) for block in shape.blocks[: step.recomputed]]
    # Checkpoints keep the boolean mask, which is otherwise freed after the forward.
    mask = batch.rows * batch.length**2 if again and batch.padded and batch.attention == "sdpa" else 0
    first_input = 0 if again or not blocks else blocks[0].input
    kept = [*checkpoints, *(block.saved for block in others)]
    # In float32, the checkpoint itself is the layer's input.
    shared_input = _hidden_bytes(step) if batch.compute_bytes == FLOAT32 else 0
    activations, gradients = sum(kept) + mask - first_input, 0
    of_kept, of_recomputed = [], []
    for number, block in reversed(list(enumerate(blocks))):
        if number < step.recomputed:
            here = activations + block.saved - shared_input
            of_recomputed.append(_in_recomputed(step, block, here, gradients))
        else:
            of_kept.append(_in_backward_of(block, activations, gradients))
        activations -= kept[number]
        gradients += block.gradients
    return DecoderMemory(
        kept=sum(kept) + mask - first_input,
        recomputed=max((block.saved - shared_input for block in again), default=0),
        gradients=gradients,
        of_kept=max(of_kept, key=lambda layer: layer.total, default=None),
        of_recomputed=max(of_recomputed, key=lambda layer: layer.total, default=None),
    )


def _hidden_bytes(step: TrainingStep) -> int:
    return step.hidden_numel * step.batch.compute_bytes


def _checkpoint(step: TrainingStep, block: Block) -> int:
    """Bytes that a recomputed decoder layer keeps: its input."""
    # bitsandbytes keeps inputs of 8-bit layers where checkpointing does not see them (MatMul8bitLt's ctx.tensors).
    hidden_from_it = kept_int8_inputs(block, step.batch) if step.quantization == "int8" else 0
    return _hidden_bytes(step) + hidden_from_it


def _in_recomputed(step: TrainingStep, block: BlockMemory, activations: int, gradients: int) -> LayerBackward:
    forward = block.forward + _hidden_bytes(step)  # and the gradient of its output
    if forward > block.backward:
        return LayerBackward(activations=activations, temporaries=forward, dequantized=0, gradients=gradients)
    return _in_backward_of(block, activations, gradients)


def _in_backward_of(block: BlockMemory, activations: int, gradients: int) -> LayerBackward:
    return LayerBackward(
        activations=activations,
        temporaries=block.backward - block.dequantized,
        dequantized=block.dequantized,
        gradients=gradients,
    )


def at_loss(step: TrainingStep, resident: Mapping[str, int], layers: DecoderMemory) -> MemoryInstant:
    """The instant at which the loss has its logits: in its forward if it is computed by chunks, otherwise in its
    backward."""
    shape, batch = step.shape, step.batch
    final_norm = FLOAT32 * (step.hidden_numel + batch.tokens)
    head = shape.vocabulary * shape.hidden_size * batch.compute_bytes
    if step.chunked_loss:
        logits = chunked_loss_memory(batch.tokens, shape.vocabulary, shape.hidden_size, batch.compute_bytes)
    else:
        logits = loss_memory(batch.tokens, shape.vocabulary)
    return MemoryInstant(
        name=f"{'forward' if step.chunked_loss else 'backward'} of the loss",
        parts={
            **resident,
            **_side_by_side(step),
            **_gradients(step, backward_has_begun=not step.chunked_loss),
            "activations": layers.kept + final_norm,
            "logits": logits,
            # PEFT puts the rows into a copy of the whole head, which has a gradient as a whole.
            **({"copy of the head for new tokens": 2 * head} if step.new_rows else {}),
        },
    )


def in_backward(step: TrainingStep, resident: Mapping[str, int], layers: DecoderMemory) -> list[MemoryInstant]:
    """The instants within a decoder layer's backward, within a recomputed layer's, and at the end of the backward, as
    far as they exist."""
    found = []
    for name, layer in ((KEPT_LAYER, layers.of_kept), (RECOMPUTED_LAYER, layers.of_recomputed)):
        if layer is not None:
            parts = {
                **resident,
                **_side_by_side(step),
                **_gradients(step, backward_has_begun=True, of_components=layer.gradients),
                "activations": layer.activations,
                "temporaries": layer.temporaries,
                "dequantized weight": layer.dequantized,
            }
            found.append(MemoryInstant(name=name, parts=parts))
    return [*found, *at_end_of_backward(step, resident, layers)] if step.shape.fused else found


def at_end_of_backward(step: TrainingStep, resident: Mapping[str, int], layers: DecoderMemory) -> list[MemoryInstant]:
    """The instants after activations have been freed: gradients of all components become those of the parameters, stack
    by stack; then ZeRO reduces them. Its shard is in float32 (``grad_accum_dtype`` in launch/zero2.json)."""
    size, optimizer = step.adapter.bytes_per_element, step.optimizer
    # With the penalty, parameters already have gradients, to which these are added.
    of_components = layers.gradients if step.adapter.penalty else max(layers.gradients, size * step.trained_numel)
    found = [
        MemoryInstant(
            name="end of the backward",
            parts={
                **resident,
                **_side_by_side(step),
                **_gradients(step, backward_has_begun=True, of_components=of_components),
                "temporaries": size * _stacks(step).largest,
            },
        )
    ]
    if optimizer.sharded:
        # For a float32 adapter, the shard is made when the first bucket is full; if all gradients fit one bucket, they
        # are in it by then. For a 16-bit adapter, each micro-batch is added to the shard in place.
        has_shard = step.trained_numel > optimizer.bucket_numel
        shards = has_shard + optimizer.gradients_between if size == FLOAT32 else 1
        parts = {
            **resident,
            "adapter gradients": size * step.trained_numel,
            "gradient shard": FLOAT32 * step.shard_numel * shards,
            "ZeRO reduction bucket": size * optimizer.bucket_numel,
        }
        found.append(MemoryInstant(name="reduction of the gradients", parts=parts))
    return found


def at_update(step: TrainingStep, resident: Mapping[str, int]) -> MemoryInstant:
    """The instant at which the optimizer updates the adapter; activations have been freed."""
    size, shard, scratch = step.adapter.bytes_per_element, step.shard_numel, step.optimizer.scratch
    if step.optimizer.sharded:
        # In float32. The gradients that the shard was made from are freed before the optimizer needs its scratch.
        gradients = {"adapter gradients": 0, "gradient shard": FLOAT32 * shard}
        temporaries = shard * max(scratch * FLOAT32, size)
    else:
        gradients = {"adapter gradients": size * step.trained_numel, "gradient shard": 0}
        temporaries = shard * scratch * size
    return MemoryInstant(name="optimizer step", parts={**resident, **gradients, "temporaries": temporaries})


def _stacks(step: TrainingStep) -> SideBySide:
    return SideBySide.of(step.shape, step.batch, step.adapter)


def _side_by_side(step: TrainingStep) -> dict[str, int]:
    """Bytes of stacked parameters and operands, which exist from the forward to the end of the backward."""
    if not step.shape.fused:
        return {}
    stacks = _stacks(step)
    return {"adapter side by side": stacks.parameters + stacks.components}


def _gradients(step: TrainingStep, *, backward_has_begun: bool, of_components: int = 0) -> dict[str, int]:
    """Bytes of gradients, beside those of the layer whose backward runs, and of DeepSpeed's buffer, by part.
    ``of_components``: gradients of components that wait for those of all layers."""
    size, optimizer = step.adapter.bytes_per_element, step.optimizer
    # The penalty's gradients wait for those of the task loss. ZeRO keeps those of an earlier micro-batch as a shard.
    of_penalty = backward_has_begun and step.adapter.penalty
    of_earlier = optimizer.gradients_between and not optimizer.sharded
    # DeepSpeed makes the bucket when the first parameter has its gradient.
    has_bucket = optimizer.sharded and backward_has_begun and not step.shape.fused
    return {
        "adapter gradients": size * step.trained_numel * (of_penalty + of_earlier) + of_components,
        "gradient shard": FLOAT32 * step.shard_numel if optimizer.sharded and optimizer.gradients_between else 0,
        "ZeRO reduction bucket": size * optimizer.bucket_numel if has_bucket else 0,
    }
