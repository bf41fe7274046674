"""How much memory a training step takes on one device, by arithmetic: nothing is loaded and nothing is run.

Shapes come from a model on the meta device; everything else is plain numbers. All results are bytes. What engines add
was read from the source of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py) and torch 2.13 (DistributedDataParallel).
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
"""Constants that share a constant of their own (double quantization)."""
NF4_TABLE = 16 * FLOAT32
"""Per weight: the 16 values of NF4."""
NESTED_TABLE = 256 * FLOAT32 + FLOAT32
"""Per weight with double quantization: the 256 values of its constants' code, and their offset."""
ZERO_ALIGNMENT = 2
"""DeepSpeed pads its flat buffers to a multiple of this per rank (``nccl_start_alignment_factor``)."""
GATHERED_LAYERS = 3
"""Layers of a sharded base that a rank has whole at a time: the one that is computed, and what is gathered of it and of
the next one before it is taken apart. By torch's code (FSDP2 of 2.13); no GPU has been looked at."""
KEPT_LAYER = "backward of a decoder layer"
RECOMPUTED_LAYER = "backward of a recomputed layer"


def base_parts(shape: ModelShape, quantization: str, compute_bytes: int, shards: int = 1) -> dict[str, int]:
    """Bytes of the frozen base by part, on one rank.

    Args:
        shape: The model's shape.
        quantization: ``nf4``, ``int8`` or ``none``; the output head is never quantized.
        compute_bytes: Bytes per element of what is not quantized.
        shards: Ranks that the weights of the layers are shared out to (``distributed.shard_base``). The rest is whole
            on each of them, and so are :data:`GATHERED_LAYERS` at a time.
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
    """How gradients become updates.

    Args:
        engine: ``zero2``, ``ddp`` or ``none``.
        world_size: Number of ranks.
        moments: Tensors of state per trained element (2 for Adam).
        moment_bytes: Bytes per element of such a tensor; None for those of the dtype that is optimized.
        scratch: Copies of what one rank optimizes that the update needs.
        bucket_numel: Elements of DeepSpeed's reduction buffer (``reduce_bucket_size``).
        gradients_between: Whether gradients of an earlier micro-batch are there when the next one begins.
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
        """Elements that one rank optimizes."""
        if not self.sharded:
            return numel
        return ZERO_ALIGNMENT * math.ceil(numel / (ZERO_ALIGNMENT * self.world_size))

    def parts(self, numel: int, element_bytes: int) -> dict[str, int]:
        """Bytes that stay between steps, by part.

        Args:
            numel: Trained elements of the whole adapter.
            element_bytes: Bytes per element of the adapter.
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
    """What the memory of a training step depends on.

    Args:
        shape: The model's shape.
        quantization: ``nf4``, ``int8`` or ``none``.
        batch: One micro-batch on one device.
        adapter: The adapter's numbers.
        optimizer: The numbers of the optimizer and of the engine.
        recomputed: The first so many decoder layers are computed again in the backward.
        chunked_loss: Whether the loss is computed without the logits of all positions.
        shards: Ranks that share the weights of the layers.
        new_rows: Trained elements in the rows of new tokens, in embedding and head.
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
        """Elements of the adapter, and of rows of new tokens, that have a gradient."""
        return self.adapter.trained_numel(self.shape) + self.new_rows

    @property
    def shard_numel(self) -> int:
        """Elements of the adapter that one rank optimizes."""
        return self.optimizer.shard_numel(self.trained_numel)

    @property
    def hidden_numel(self) -> int:
        """Elements of the hidden states of the micro-batch."""
        return self.batch.tokens * self.shape.hidden_size


@dataclass(frozen=True, kw_only=True)
class MemoryInstant:
    """What is in memory at one instant of a step, by part, in bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of a training step, in bytes.

    Args:
        resident: What stays in memory all the time, by part.
        activations: What the backward needs when it begins.
        recomputed: Activations of a decoder layer while it is computed again; 0 where none is.
        instants: The instants at which memory can be at its peak.
        approximate: Whether the decoder layers are routed, or built unlike Llama's, so that their activations are a
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

    There are three float32 tensors of (tokens, vocabulary): the log-probabilities, their gradient, and that of the
    logits. (In the forward there are the logits in the compute dtype, in float32, and the log-probabilities: no more.)
    """
    return 3 * FLOAT32 * tokens * vocabulary


def chunked_loss_memory(tokens: int, vocabulary: int, hidden_size: int, compute_bytes: int) -> int:
    """Bytes of the cross-entropy by chunks (:mod:`dora_dist.base_model.chunked_loss`) at its peak, in its forward.

    There are the head's input and its gradient of (tokens, hidden_size), and of one chunk the logits in float32 (as
    they come, or their gradient as it goes, in the compute dtype beside them) and the gradient of the head's input.
    """
    chunk = min(tokens, chunk_length(vocabulary))
    logits = FLOAT32 if compute_bytes == FLOAT32 else FLOAT32 + compute_bytes
    return chunk * vocabulary * logits + (2 * tokens + chunk) * hidden_size * compute_bytes


def step_memory(step: TrainingStep) -> StepMemory:
    """Memory of a training step: what stays, what comes and goes, and the instants that can be the peak."""
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
    """What there is at the peak of the backward of one decoder layer, in bytes.

    Args:
        activations: Its own, and what is kept for the layers before it.
        temporaries: What its backward needs beyond them, without ``dequantized``.
        dequantized: The largest dequantized weight at that point.
        gradients: Of the components of the layers after it.
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
        kept: What the backward needs when it begins: the inputs of the layers that are recomputed, and the activations
            of the others.
        recomputed: The activations of the layer that is being recomputed.
        gradients: Of the components of all layers, when the backward has left them.
        of_kept: The backward of the layer that is not recomputed at which there is most; None where there is none.
        of_recomputed: The same of one that is.
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
    # Checkpoints hold the boolean mask, which otherwise goes with the forward.
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
    """What a decoder layer keeps that is recomputed: its input."""
    # bitsandbytes keeps inputs of 8-bit layers where checkpointing does not see them (MatMul8bitLt's ctx.tensors).
    hidden_from_it = kept_int8_inputs(block, step.batch) if step.quantization == "int8" else 0
    return _hidden_bytes(step) + hidden_from_it


def _in_recomputed(step: TrainingStep, block: BlockMemory, activations: int, gradients: int) -> LayerBackward:
    forward = block.forward + _hidden_bytes(step)  # and the gradient that has come down to it
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
    """The loss has its logits: in the forward if it is computed by chunks, in its backward otherwise."""
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
            # PEFT puts the rows into a copy of the head, of which there is a gradient as a whole.
            **({"copy of the head for new tokens": 2 * head} if step.new_rows else {}),
        },
    )


def in_backward(step: TrainingStep, resident: Mapping[str, int], layers: DecoderMemory) -> list[MemoryInstant]:
    """The backward is in a decoder layer, in one of those that are recomputed, and at its end, where there are such."""
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
    """Activations are gone. Gradients of all components become those of the parameters, stack by stack; then ZeRO
    reduces them. Its shard is of float32 (``grad_accum_dtype`` in launch/zero2.json)."""
    size, optimizer = step.adapter.bytes_per_element, step.optimizer
    # Those of the penalty have a place of their own, to which these are added.
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
        # In float32, the shard is made when the first bucket is full; where all gradients fit one, they have gone into
        # it by then. To one of a 16-bit adapter, each micro-batch is added in place.
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
    """The optimizer updates the adapter; activations are gone."""
    size, shard, scratch = step.adapter.bytes_per_element, step.shard_numel, step.optimizer.scratch
    if step.optimizer.sharded:
        # In float32; what it was made of is gone before the optimizer needs its scratch.
        gradients = {"adapter gradients": 0, "gradient shard": FLOAT32 * shard}
        temporaries = shard * max(scratch * FLOAT32, size)
    else:
        gradients = {"adapter gradients": size * step.trained_numel, "gradient shard": 0}
        temporaries = shard * scratch * size
    return MemoryInstant(name="optimizer step", parts={**resident, **gradients, "temporaries": temporaries})


def _stacks(step: TrainingStep) -> SideBySide:
    return SideBySide.of(step.shape, step.batch, step.adapter)


def _side_by_side(step: TrainingStep) -> dict[str, int]:
    """From the forward to the end of the backward."""
    if not step.shape.fused:
        return {}
    stacks = _stacks(step)
    return {"adapter side by side": stacks.parameters + stacks.components}


def _gradients(step: TrainingStep, *, backward_has_begun: bool, of_components: int = 0) -> dict[str, int]:
    """Gradients that are there beside those of a layer of this micro-batch's task loss, and DeepSpeed's buffer, by
    part."""
    size, optimizer = step.adapter.bytes_per_element, step.optimizer
    # Those of the penalty wait for those of the task loss; ZeRO keeps what an earlier micro-batch left as a shard.
    of_penalty = backward_has_begun and step.adapter.penalty
    of_earlier = optimizer.gradients_between and not optimizer.sharded
    # DeepSpeed makes it when the first parameter has its gradient.
    has_bucket = optimizer.sharded and backward_has_begun and not step.shape.fused
    return {
        "adapter gradients": size * step.trained_numel * (of_penalty + of_earlier) + of_components,
        "gradient shard": FLOAT32 * step.shard_numel if optimizer.sharded and optimizer.gradients_between else 0,
        "ZeRO reduction bucket": size * optimizer.bucket_numel if has_bucket else 0,
    }
