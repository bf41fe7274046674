"""Estimates memory per GPU from a run's configuration, before any weight is read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from dora_dist.adapter.ranks import resolve_ranks
from dora_dist.base_model import block_weights
from dora_dist.base_model.chunked_loss import obstacle
from dora_dist.base_model.load import BaseModelSpec, load_skeleton
from dora_dist.base_model.new_tokens import num_row_parameters
from dora_dist.base_model.recomputation import Recomputation, number_of_recomputed, recomputable_layers
from dora_dist.base_model.shape import read_shape
from dora_dist.config.adapter import DRAWN_INITS, PROMPT, RANKS_FROM_DATA
from dora_dist.config.pruning import LOSS_CHANGE, MODULES_PER_LAYER, NONE, PRUNE
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.config.training import recomputes_layers, training_argument, whole_number
from dora_dist.console.text import GIB
from dora_dist.distributed.launcher import check_world_size
from dora_dist.memory.activations import Adapter, Batch
from dora_dist.memory.start import at_start
from dora_dist.memory.step import Optimizer, StepMemory, TrainingStep, step_memory

WORLD_SIZES = (1, 2, 4, 8, 16, 32)
"""Numbers of ranks for which the shards of ZeRO are shown."""
DEVICES = ("cuda", "cpu")
GPU_SIZES = (16, 24, 40, 48, 80, 96, 141, 192)
"""Memory of common GPUs, in GiB."""
GPUS_OF_A_NODE = 8
"""Assumed number of GPUs on a node if no launcher says it."""
LEFT_FREE = 0.15
"""Share of a GPU that ``model.recompute_layers: auto`` leaves free: the estimate has not been compared with a GPU, and
does not count CUDA's context, NCCL's buffers or fragmentation."""
SINGLE_MOMENT = ("lion", "rmsprop", "adagrad", "momentum")
"""Parts of the names of optimizers that keep one tensor of state per parameter."""
NO_MOMENT = ("sgd", "adafactor")
"""Parts of the names of optimizers that keep none, or next to none."""
OWN_KERNEL = ("fused", "bnb", "8bit", "paged")
"""Parts of the names of optimizers that update in place, without scratch."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory that a run takes on one device.

    Args:
        model: path or name of the base.
        quantization: ``model.quantization``.
        compute_dtype: dtype of activations, with ``auto`` resolved.
        adapter_dtype: dtype of the adapter's parameters, with ``auto`` resolved.
        engine: ``distributed.engine``.
        device: ``cuda`` or ``cpu``.
        world_size: number of ranks.
        rows: number of rows in a micro-batch on one device.
        length: most tokens in a row.
        accumulation: number of micro-batches in an optimizer step.
        recomputation: decoder layers that are computed again in the backward, as configured.
        configured: memory with ``recomputation``.
        recomputing_none: memory if no layer is computed again.
        recomputing_all: memory if all layers are.
        auto: size of a GPU in GiB -> number of layers that ``auto`` recomputes on it; None if the step does not fit.
        shards: number of ranks -> bytes that ZeRO keeps on each of them for master copy, moments and gradient shard
            (empty for other engines).
        left_out: what ``all-linear`` leaves out, in words; None if it leaves out nothing, or the layers were named.
    """

    model: str
    quantization: str
    compute_dtype: str
    adapter_dtype: str
    engine: str
    device: str
    world_size: int
    rows: int
    length: int
    accumulation: int
    recomputation: Recomputation
    configured: StepMemory
    recomputing_none: StepMemory
    recomputing_all: StepMemory
    auto: dict[int, int | None]
    shards: dict[int, int]
    left_out: str | None

    @property
    def peak_bytes(self) -> int:
        """Most bytes that are allocated at once, as configured."""
        return self.configured.peak.total

    @property
    def tokens_per_micro_batch(self) -> int:
        """Most tokens in a micro-batch on one device."""
        return self.rows * self.length

    @property
    def tokens_per_step(self) -> int:
        """Most tokens in an optimizer step on all ranks together."""
        return self.tokens_per_micro_batch * self.accumulation * self.world_size


def estimate_memory(
    config: RunConfig, world_size: int, device: str = "cuda", card: int | None = None
) -> MemoryEstimate:
    """Memory per device of a run whose micro-batches are as large as they can be.

    Args:
        config: the run's configuration.
        world_size: number of ranks.
        device: device of the run, ``cuda`` or ``cpu``; this machine may have another one.
        card: bytes of memory of the run's smallest GPU, for ``model.recompute_layers: auto``; None if it is not known:
            ``auto`` then recomputes all layers.

    Raises:
        ValueError: the model cannot be found, ``adapter.target_modules`` matches nothing in it, quantization would
            leave too much of it unquantized, or a number is invalid.
    """
    if config.task != CAUSAL_LM:
        raise ValueError(f"task is {config.task}, but memory can be estimated for {CAUSAL_LM} only")
    check_world_size(world_size, config.distributed.engine)
    if device not in DEVICES:
        raise ValueError(f"--device is {device!r}, but must be one of {', '.join(DEVICES)}")
    rows = whole_number(config.training, "per_device_train_batch_size")
    accumulation = whole_number(config.training, "gradient_accumulation_steps")
    skeleton = load_skeleton(BaseModelSpec.of(config.model, config.task))
    block_weights.check_quantized(skeleton, config.model.quantization, config.model.allow_unquantized)
    ranks = resolve_ranks(skeleton, config.adapter)
    compute_dtype, adapter_dtype = _dtypes(config, device)
    shape = read_shape(skeleton, ranks, config.model.fuse)
    step = TrainingStep(
        shape=shape,
        quantization=config.model.quantization,
        batch=_batch(config, rows, compute_dtype, config.model.attention or skeleton.config._attn_implementation),
        adapter=_adapter(config, adapter_dtype),
        optimizer=_optimizer(config, world_size, device, accumulation),
        recomputed=0,
        chunked_loss=_has_loss_without_logits(config, skeleton),
        new_rows=num_row_parameters(skeleton, len(config.adapter.new_tokens or [])),
        shards=_base_shards(config, world_size),
    )
    steps = [_memory(config, replace(step, recomputed=count)) for count in range(len(shape.blocks) + 1)]
    again = _recomputed(config, skeleton, steps, card)
    return MemoryEstimate(
        model=config.model.path,
        quantization=step.quantization,
        compute_dtype=compute_dtype,
        adapter_dtype=adapter_dtype,
        engine=config.distributed.engine,
        device=device,
        world_size=world_size,
        rows=rows,
        length=step.batch.length,
        accumulation=accumulation,
        recomputation=Recomputation(again, len(shape.blocks)),
        configured=steps[again],
        recomputing_none=steps[0],
        recomputing_all=steps[-1],
        auto={size: fewest_recomputed(steps, size * GIB) for size in GPU_SIZES} if device == "cuda" else {},
        shards=_shards(step) if step.optimizer.sharded else {},
        left_out=block_weights.describe_left_out(skeleton, config.adapter, ranks),
    )


def _has_loss_without_logits(config: RunConfig, skeleton: PreTrainedModel) -> bool:
    fits = config.model.fuse and config.adapter.new_tokens is None
    return fits and obstacle(skeleton.requires_grad_(False)) is None


def _memory(config: RunConfig, step: TrainingStep) -> StepMemory:
    """Memory of a training step and, if configured, of ranks and start from data."""
    memory, adapter = step_memory(step), config.adapter
    if config.adapter.routing == PROMPT:
        memory = replace(memory, approximate=True)
    made = [adapter.ranks] * (adapter.ranks in RANKS_FROM_DATA) + [adapter.init] * (adapter.init not in DRAWN_INITS)
    row = replace(step.batch, rows=1, padded=_is_padded(config, 1))
    first = [at_start(replace(step, batch=row), what) for what in made]
    return replace(memory, instants=(*first, *memory.instants))


def card_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a CPU, whose memory other programs use too."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def fewest_recomputed(steps: Sequence[StepMemory], card: int) -> int | None:
    """Smallest number of recomputed decoder layers with which a step fits a GPU, with :data:`LEFT_FREE` left free; None
    if it does not fit with any number.

    Args:
        steps: memory of a step for each number of recomputed layers, from 0 on.
        card: bytes of the GPU's memory.
    """
    fitting = (count for count, step in enumerate(steps) if step.peak.total <= (1 - LEFT_FREE) * card)
    return next(fitting, None)


def _recomputed(config: RunConfig, skeleton: PreTrainedModel, steps: Sequence[StepMemory], card: int | None) -> int:
    """Number of decoder layers that are recomputed as configured; ``steps`` has the memory for every number of them."""
    setting, most = config.model.recompute_layers, len(steps) - 1
    if setting is None:
        return most if recomputes_layers(config.training) else 0
    layers = recomputable_layers(skeleton)
    if setting != "auto":
        return min(most, number_of_recomputed(setting, layers, config.model.path))
    # An approximate estimate is not relied on.
    if card is None or len(layers) != most or steps[0].approximate:
        return most
    fewest = fewest_recomputed(steps, card)
    return most if fewest is None else fewest


def _dtypes(config: RunConfig, device: str) -> tuple[str, str]:
    """Names of the compute dtype and of the adapter's, as a run on the device would resolve ``auto``."""
    compute, adapter = config.model.compute_dtype, config.adapter.dtype
    if compute == "auto":
        compute = "bfloat16" if device == "cuda" else "float32"
    if adapter == "auto":
        adapter = compute if config.distributed.engine == "zero2" else "float32"
    return compute, adapter


def _bytes_of(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def _batch(config: RunConfig, rows: int, compute_dtype: str, attention: str) -> Batch:
    return Batch(
        rows=rows,
        length=config.data.max_length,
        compute_bytes=_bytes_of(compute_dtype),
        # Any other kind is assumed to keep no square matrix, like flash attention.
        attention="sdpa" if attention == "sdpa" else "eager" if attention == "eager" else "flash",
        padded=_is_padded(config, rows),
        # accelerate wraps the model in autocast, unless DeepSpeed has cast all parameters.
        autocast=compute_dtype == "bfloat16" and config.distributed.engine != "zero2",
    )


def _is_padded(config: RunConfig, rows: int) -> bool:
    """Whether attention needs a mask: only the longest row is taken to be full; packed rows have a mask of blocks."""
    return rows > 1 or config.data.batching == "packed"


def _adapter(config: RunConfig, dtype: str) -> Adapter:
    return Adapter(
        bytes_per_element=_bytes_of(dtype),
        dropout=config.adapter.dropout > 0,
        trained_gates=config.adapter.train_gates,
        penalty=config.pruning.rule == PRUNE and config.pruning.equilibrium_weight > 0,
        masked=config.pruning.rule == MODULES_PER_LAYER or config.adapter.num_slots > config.adapter.target_rank,
        watched=config.pruning.rule != NONE and config.pruning.importance == LOSS_CHANGE,
    )


def _optimizer(config: RunConfig, world_size: int, device: str, accumulation: int) -> Optimizer:
    name = str(training_argument(config.training, "optim"))
    moments = 2
    if any(part in name for part in SINGLE_MOMENT):
        moments = 1
    elif any(part in name for part in NO_MOMENT):
        moments = 0
    engine = config.distributed.engine
    scratch = 0
    if moments and not any(part in name for part in OWN_KERNEL):
        # torch computes on lists of all tensors on a GPU and on one at a time on a CPU, where ZeRO has one large one.
        scratch = 1 if device == "cuda" else 2 if engine == "zero2" else 0
    return Optimizer(
        engine=engine,
        world_size=world_size,
        moments=moments,
        moment_bytes=1 if "8bit" in name else None,
        scratch=scratch,
        gradients_between=accumulation > 1,
    )


def _base_shards(config: RunConfig, world_size: int) -> int:
    """Number of ranks that share a base. For a node: the number that the launcher gives, or :data:`GPUS_OF_A_NODE`."""
    over = config.distributed.shard_base
    if not over:
        return 1
    return world_size if over is True else min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", GPUS_OF_A_NODE)))


def _shards(step: TrainingStep) -> dict[int, int]:
    """Number of ranks -> bytes of master copy, moments and gradient shard on each of them."""
    trained, size = step.trained_numel, step.adapter.bytes_per_element
    found = {}
    for ranks in sorted({*WORLD_SIZES, step.optimizer.world_size}):
        optimizer = replace(step.optimizer, world_size=ranks)
        found[ranks] = sum(optimizer.parts(trained, size).values()) + size * optimizer.shard_numel(trained)
    return found
