"""How much memory a training step takes on one device, by arithmetic: nothing is loaded and nothing is run.

Shapes come from a model on the meta device; everything else is plain numbers. All results are bytes. What engines add
was read from the source of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py) and torch 2.13 (DistributedDataParallel).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dora_dist.base_model.chunked_loss import chunk_length
from dora_dist.base_model.shape import ModelShape
from dora_dist.memory.activations import FLOAT32, NF4_BLOCK, Adapter, Batch, BlockMemory, block_memory, kept_int8_inputs

NF4_NESTED_BLOCK = 256
"""Constants that share a constant of their own (double quantization)."""
NF4_TABLES = 16 * FLOAT32 + 256 * FLOAT32 + FLOAT32
"""Per weight: the 16 values of NF4, the 256 of its constants' code, and their offset."""
ZERO_ALIGNMENT = 2
"""DeepSpeed pads its flat buffers to a multiple of this per rank (``nccl_start_alignment_factor``)."""
LAST_LAYER = "backward of the last decoder layer"
RECOMPUTED_LAYER = "backward of a recomputed layer"


def base_parts(shape: ModelShape, quantization: str, compute_bytes: int) -> dict[str, int]:
    """Bytes of the frozen base by part.

    Args:
        shape: The model's shape.
        quantization: ``nf4`` (double quantization), ``int8`` or ``none``; the output head is never quantized.
        compute_bytes: Bytes per element of what is not quantized.
    """
    inner = [linear for linear in shape.linears if not linear.is_head]
    if quantization == "nf4":
        weights = {"4-bit weights": sum(math.ceil(linear.numel / 2) for linear in inner)}
        constants = sum(_nf4_constants(linear.numel) for linear in inner)
    elif quantization == "int8":
        weights = {"8-bit weights": sum(linear.numel for linear in inner)}
        constants = sum(FLOAT32 * linear.out_features for linear in inner)
    else:
        weights = {"linear weights": compute_bytes * sum(linear.numel for linear in inner)}
        constants = 0
    return {
        **weights,
        "quantization constants": constants,
        "embeddings and head": compute_bytes * shape.embedding_numel,
        "norms and others": compute_bytes * shape.other_numel + shape.buffer_bytes,
    }


def _nf4_constants(numel: int) -> int:
    blocks = math.ceil(numel / NF4_BLOCK)
    return blocks + FLOAT32 * math.ceil(blocks / NF4_NESTED_BLOCK) + NF4_TABLES


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
    """

    shape: ModelShape
    quantization: str
    batch: Batch
    adapter: Adapter
    optimizer: Optimizer
    recomputed: int
    chunked_loss: bool = True

    @property
    def trained_numel(self) -> int:
        """Elements of the adapter that have a gradient."""
        return self.adapter.trained_numel(self.shape)

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
        moments: The instants at which memory can be at its peak.
        approximate: Whether the decoder layers are built unlike Llama's, so that their activations are a guess.
    """

    resident: Mapping[str, int]
    activations: int
    recomputed: int
    moments: Sequence[MemoryInstant]
    approximate: bool = False

    @property
    def peak(self) -> MemoryInstant:
        return max(self.moments, key=lambda moment: moment.total)


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
        **base_parts(step.shape, step.quantization, step.batch.compute_bytes),
        "adapter": step.adapter.nbytes(step.shape),
        **step.optimizer.parts(step.trained_numel, step.adapter.bytes_per_element),
    }
    layers = decoder_memory(step)
    return StepMemory(
        resident=resident,
        activations=layers.kept,
        recomputed=layers.recomputed,
        moments=(at_loss(step, resident, layers), *in_backward(step, resident, layers), at_update(step, resident)),
        approximate=not all(block.is_known for block in step.shape.blocks) or not step.shape.blocks,
    )


@dataclass(frozen=True)
class Beyond:
    """The most that the backward of a layer needs beyond its activations, in bytes: the largest dequantized weight at
    that point, and everything else."""

    temporaries: int
    dequantized: int


@dataclass(frozen=True, kw_only=True)
class DecoderMemory:
    """Activations of all decoder layers together, in bytes.

    Args:
        kept: What the backward needs when it begins: the inputs of the layers that are recomputed, and the activations
            of the others.
        checkpoints: Of these, what is left when the backward comes to the layers that are recomputed: their inputs.
        recomputed: The activations of the layer that is being recomputed.
        of_kept: What the backward of a layer that is not recomputed needs beyond them; None where there is none.
        of_recomputed: The same of one that is.
    """

    kept: int
    checkpoints: int
    recomputed: int
    of_kept: Beyond | None
    of_recomputed: Beyond | None


def decoder_memory(step: TrainingStep) -> DecoderMemory:
    """Activations of the decoder layers, from those of each layer."""
    shape, batch = step.shape, step.batch
    blocks = [block_memory(block, shape, batch, step.adapter, step.quantization) for block in shape.blocks]
    again, others = blocks[: step.recomputed], blocks[step.recomputed :]
    hidden_bytes = step.hidden_numel * batch.compute_bytes
    # Checkpoints hold the boolean mask, which otherwise goes with the forward.
    mask = batch.rows * batch.length**2 if again and batch.padded and batch.attention == "sdpa" else 0
    checkpoints = len(again) * hidden_bytes + mask
    if step.quantization == "int8":
        # bitsandbytes keeps inputs of 8-bit layers where checkpointing does not see them (MatMul8bitLt's ctx.tensors).
        checkpoints += sum(kept_int8_inputs(block, batch) for block in shape.blocks[: step.recomputed])
    first_input = 0 if again or not blocks else blocks[0].input
    recomputed, of_recomputed = 0, None
    if again:
        largest = _neediest(again)
        # In float32, the checkpoint itself is the layer's input.
        recomputed = largest.saved - (hidden_bytes if batch.compute_bytes == FLOAT32 else 0)
        forward = largest.forward + hidden_bytes  # and the gradient that has come down to it
        of_recomputed = Beyond(forward, 0) if forward > largest.backward else _in_backward_of(largest)
    return DecoderMemory(
        kept=checkpoints + sum(block.saved for block in others) - first_input,
        checkpoints=checkpoints,
        recomputed=recomputed,
        of_kept=_in_backward_of(_neediest(others)) if others else None,
        of_recomputed=of_recomputed,
    )


def _neediest(blocks: Sequence[BlockMemory]) -> BlockMemory:
    return max(blocks, key=lambda block: block.saved + block.backward)


def _in_backward_of(block: BlockMemory) -> Beyond:
    return Beyond(block.backward - block.dequantized, block.dequantized)


def at_loss(step: TrainingStep, resident: Mapping[str, int], layers: DecoderMemory) -> MemoryInstant:
    """The loss has its logits: in the forward if it is computed by chunks, in its backward otherwise."""
    shape, batch = step.shape, step.batch
    final_norm = FLOAT32 * (step.hidden_numel + batch.tokens)
    if step.chunked_loss:
        logits = chunked_loss_memory(batch.tokens, shape.vocabulary, shape.hidden_size, batch.compute_bytes)
    else:
        logits = loss_memory(batch.tokens, shape.vocabulary)
    return MemoryInstant(
        name=f"{'forward' if step.chunked_loss else 'backward'} of the loss",
        parts={
            **resident,
            **_gradients(step, backward_has_begun=not step.chunked_loss),
            "activations": layers.kept + final_norm,
            "logits": logits,
        },
    )


def in_backward(step: TrainingStep, resident: Mapping[str, int], layers: DecoderMemory) -> list[MemoryInstant]:
    """The backward is in the last decoder layer, and in the last of those that are recomputed, where there are such."""
    found = []
    for name, activations, beyond in (
        (LAST_LAYER, layers.kept, layers.of_kept),
        (RECOMPUTED_LAYER, layers.checkpoints + layers.recomputed, layers.of_recomputed),
    ):
        if beyond is not None:
            parts = {
                **resident,
                **_gradients(step, backward_has_begun=True),
                "activations": activations,
                "temporaries": beyond.temporaries,
                "dequantized weight": beyond.dequantized,
            }
            found.append(MemoryInstant(name=name, parts=parts))
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


def _gradients(step: TrainingStep, *, backward_has_begun: bool) -> dict[str, int]:
    """Gradients that are there before those of this micro-batch's task loss, and DeepSpeed's buffer, by part."""
    size, optimizer = step.adapter.bytes_per_element, step.optimizer
    # Those of the penalty wait for those of the task loss; ZeRO keeps what an earlier micro-batch left as a shard.
    of_penalty = backward_has_begun and step.adapter.penalty
    of_earlier = optimizer.gradients_between and not optimizer.sharded
    return {
        "adapter gradients": size * step.trained_numel * (of_penalty + of_earlier),
        "gradient shard": size * step.shard_numel if optimizer.sharded and optimizer.gradients_between else 0,
        # DeepSpeed makes it for every backward.
        "ZeRO reduction bucket": size * optimizer.bucket_numel if optimizer.sharded and backward_has_begun else 0,
    }
