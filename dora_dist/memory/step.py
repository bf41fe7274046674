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


def base_parts(shape: ModelShape, quantization: str, compute_bytes: int) -> dict[str, int]:
    """Bytes of the frozen base by part.

    Args:
        shape: of the model.
        quantization: ``nf4`` (double quantization), ``int8`` or ``none``; the output head is never quantized.
        compute_bytes: per element of what is not quantized.
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
        world_size: number of ranks.
        moments: tensors of state per trained element (2 for Adam).
        moment_bytes: per element of one; None for the dtype that is optimized.
        scratch: copies of what one rank optimizes, in flight during the step.
        bucket_numel: elements of DeepSpeed's reduction buffer (``reduce_bucket_size``).
        gradients_between: whether gradients of an earlier micro-batch are there when the next one begins.
    """

    engine: Literal["zero2", "ddp", "none"]
    world_size: int
    moments: int = 2
    moment_bytes: int | None = None
    scratch: int = 1
    bucket_numel: int = 50_000_000
    gradients_between: bool = False

    def shard_numel(self, numel: int) -> int:
        """Elements that one rank optimizes."""
        if self.engine != "zero2":
            return numel
        return ZERO_ALIGNMENT * math.ceil(numel / (ZERO_ALIGNMENT * self.world_size))

    def parts(self, numel: int, element_bytes: int) -> dict[str, int]:
        """Bytes that stay between steps, by part.

        Args:
            numel: trained elements of the whole adapter.
            element_bytes: per element of the adapter.
        """
        shard = self.shard_numel(numel)
        zero = self.engine == "zero2"
        optimized = FLOAT32 if zero else element_bytes
        moments = shard * self.moments * (optimized if self.moment_bytes is None else self.moment_bytes)
        return {
            "float32 master copy": shard * FLOAT32 if zero else 0,
            "optimizer moments": moments,
            # DDP reduces in copies of the gradients, unless they are views of its buckets.
            "gradient buckets": numel * element_bytes if self.engine == "ddp" else 0,
        }


@dataclass(frozen=True, kw_only=True)
class MemoryInstant:
    """What is in memory at one moment of a step, by part, in bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of a training step, in bytes.

    Args:
        resident: by part, all the time.
        activations: kept for the backward without gradient checkpointing.
        checkpointed_activations: kept for the backward with it.
        recomputed: with gradient checkpointing, those of the one decoder layer that is being recomputed.
        moments: that can be the peak.
        approximate: the decoder layers are built unlike Llama's, so that their activations are a guess.
    """

    resident: Mapping[str, int]
    activations: int
    checkpointed_activations: int
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


def step_memory(
    shape: ModelShape,
    *,
    quantization: str,
    batch: Batch,
    adapter: Adapter,
    optimizer: Optimizer,
    checkpointing: bool,
    chunked_loss: bool = True,
) -> StepMemory:
    """Memory of a training step: what stays, what comes and goes, and the moment at which that is most.

    Args:
        shape: of the model.
        quantization: of the base.
        batch: a micro-batch.
        adapter: its numbers.
        optimizer: its numbers, and the engine's.
        checkpointing: gradient checkpointing is on.
        chunked_loss: the loss is computed without the logits of all positions.
    """
    trained, size = adapter.trained_numel(shape), adapter.bytes_per_element
    shard, scratch = optimizer.shard_numel(trained), optimizer.scratch
    zero = optimizer.engine == "zero2"
    resident = {
        **base_parts(shape, quantization, batch.compute_bytes),
        "adapter": adapter.nbytes(shape),
        **optimizer.parts(trained, size),
    }
    blocks = [block_memory(block, shape, batch, adapter, quantization) for block in shape.blocks]
    hidden = batch.tokens * shape.hidden_size
    final_norm = FLOAT32 * (hidden + batch.tokens)
    plain = sum(block.saved for block in blocks) - (blocks[0].input if blocks else 0)
    # Checkpoints hold the boolean mask, which otherwise goes with the forward.
    square = batch.rows * batch.length**2 if batch.padded and batch.attention == "sdpa" else 0
    inputs = len(blocks) * hidden * batch.compute_bytes + square
    if quantization == "int8":
        # bitsandbytes keeps inputs of 8-bit layers where checkpointing does not see them (MatMul8bitLt's ctx.tensors).
        inputs += sum(kept_int8_inputs(block, batch) for block in shape.blocks)
    largest = max(blocks, key=lambda block: block.saved + block.backward, default=BlockMemory())
    recomputed = largest.saved
    temporaries, dequantized = largest.backward - largest.dequantized, largest.dequantized
    forward = largest.forward + hidden * batch.compute_bytes  # and the gradient that has come down to it
    if checkpointing and forward > largest.backward:
        temporaries, dequantized = forward, 0
    if batch.compute_bytes == FLOAT32:
        recomputed -= FLOAT32 * hidden  # the checkpoint itself
    kept = inputs if checkpointing else plain
    # The penalty's wait for those of the task loss; ZeRO keeps what an earlier micro-batch has left as a shard.
    early = adapter.penalty + (optimizer.gradients_between and not zero)
    in_backward = {
        "adapter gradients": size * trained * early,
        # What earlier micro-batches left, and the buffer that DeepSpeed makes for every backward.
        "gradient shard": size * shard if zero and optimizer.gradients_between else 0,
        "ZeRO reduction bucket": size * optimizer.bucket_numel if zero else 0,
    }
    if chunked_loss:
        logits = chunked_loss_memory(batch.tokens, shape.vocabulary, shape.hidden_size, batch.compute_bytes)
        # In the forward: only earlier micro-batches have left gradients, and DeepSpeed has no buffer yet.
        early = size * trained * (optimizer.gradients_between and not zero)
        at_loss = {**in_backward, "adapter gradients": early, "ZeRO reduction bucket": 0}
    else:
        logits, at_loss = loss_memory(batch.tokens, shape.vocabulary), in_backward
    moments = (
        MemoryInstant(
            name=f"{'forward' if chunked_loss else 'backward'} of the loss",
            parts={**resident, **at_loss, "activations": kept + final_norm, "logits": logits},
        ),
        MemoryInstant(
            name="backward of a decoder layer" if checkpointing else "backward of the last decoder layer",
            parts={
                **resident,
                **in_backward,
                "activations": kept + (recomputed if checkpointing else 0),
                "temporaries": temporaries,
                "dequantized weight": dequantized,
            },
        ),
        MemoryInstant(
            name="optimizer step",
            parts={
                **resident,
                "adapter gradients": 0 if zero else size * trained,
                # In float32; what it was made of is gone before the optimizer needs its scratch.
                "gradient shard": FLOAT32 * shard if zero else 0,
                "temporaries": shard * (max(scratch * FLOAT32, size) if zero else scratch * size),
            },
        ),
    )
    return StepMemory(
        resident=resident,
        activations=plain,
        checkpointed_activations=inputs,
        recomputed=recomputed,
        moments=moments,
        approximate=not all(block.is_known for block in shape.blocks) or not shape.blocks,
    )
