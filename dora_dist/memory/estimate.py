"""Memory per GPU of a run that is configured, before any weight is read."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.config.training import training_argument, whole_number
from dora_dist.distributed.launcher import check_world_size

if TYPE_CHECKING:
    from dora_dist.memory.step import Optimizer, StepMemory


WORLD_SIZES = (1, 2, 4, 8, 16, 32)


DEVICES = ("cuda", "cpu")


SINGLE_MOMENT = ("lion", "rmsprop", "adagrad", "momentum")


NO_MOMENT = ("sgd", "adafactor")


OWN_KERNEL = ("fused", "bnb", "8bit", "paged")
"""In names of optimizers that update in place, without scratch."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a run takes on one device.

    Args:
        model: path or name of the base.
        quantization: of the base.
        compute_dtype: of activations, resolved.
        adapter_dtype: of the adapter's parameters, resolved.
        engine: ``distributed.engine``.
        device: ``cuda`` or ``cpu``.
        world_size: number of ranks.
        rows: examples of a micro-batch on one device.
        length: tokens of a row, at most.
        accumulation: micro-batches of an optimizer step.
        checkpointing: whether the configuration has gradient checkpointing on.
        without: memory without gradient checkpointing, in bytes.
        with_checkpointing: memory with it, in bytes.
        shards: number of ranks -> bytes that ZeRO leaves on each of them for master copy, moments and gradient shard
            (empty for other engines).
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
    checkpointing: bool
    without: "StepMemory"
    with_checkpointing: "StepMemory"
    shards: dict[int, int]

    @property
    def configured(self) -> "StepMemory":
        """Memory with gradient checkpointing as the configuration has it."""
        return self.with_checkpointing if self.checkpointing else self.without

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at once, as configured."""
        return self.configured.peak.total

    @property
    def tokens_per_micro_batch(self) -> int:
        """On one device, at most."""
        return self.rows * self.length

    @property
    def tokens_per_step(self) -> int:
        """Of an optimizer step, all ranks together, at most."""
        return self.tokens_per_micro_batch * self.accumulation * self.world_size


def estimate_memory(config: RunConfig, world_size: int, device: str = "cuda") -> MemoryEstimate:
    """Memory per device of a run whose micro-batches are as large as they can be.

    Args:
        config: of the run.
        world_size: number of ranks.
        device: what it will run on, ``cuda`` or ``cpu``; not what there is here.

    Raises:
        ValueError: the model cannot be found, ``adapter.target_modules`` matches nothing in it, or a number cannot be.
    """
    import torch

    from dora_dist.adapter.targets import resolve_targets
    from dora_dist.base_model.chunked_loss import obstacle
    from dora_dist.base_model.load import BaseModelSpec, load_skeleton
    from dora_dist.base_model.shape import read_shape
    from dora_dist.memory.activations import Adapter, Batch
    from dora_dist.memory.step import step_memory

    if config.task != CAUSAL_LM:
        raise ValueError(f"task is {config.task}, but memory can be estimated for {CAUSAL_LM} only")
    engine = config.distributed.engine
    check_world_size(world_size, engine)
    if device not in DEVICES:
        raise ValueError(f"--device is {device!r}, but must be one of {', '.join(DEVICES)}")
    rows, accumulation = (
        whole_number(config.training, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    skeleton = load_skeleton(BaseModelSpec.of(config.model, config.task))
    shape = read_shape(skeleton, resolve_targets(skeleton, config.adapter.target_modules), config.model.fuse)
    compute = _dtype_of(config.model.compute_dtype, "bfloat16" if device == "cuda" else "float32")
    adapter_dtype = _dtype_of(config.adapter.dtype, compute if engine == "zero2" else "float32")
    compute_bytes, adapter_bytes = (getattr(torch, name).itemsize for name in (compute, adapter_dtype))
    batch = Batch(
        rows=rows,
        length=config.data.max_length,
        compute_bytes=compute_bytes,
        attention=_attention(config.model.attention or skeleton.config._attn_implementation),
        # The longest row is full, but not all are; packed rows have a mask of blocks.
        padded=rows > 1 or config.data.batching == "packed",
        # accelerate wraps the model in it, unless DeepSpeed has cast all parameters.
        autocast=compute == "bfloat16" and engine != "zero2",
    )
    adapter = Adapter(
        rank=config.adapter.start_rank,
        bytes_per_element=adapter_bytes,
        dropout=config.adapter.dropout > 0,
        trained_gates=config.adapter.train_gates,
        penalty=config.pruning.equilibrium_weight > 0,
    )
    optimizer = _optimizer(config, world_size, device, accumulation)
    of_step = partial(
        step_memory,
        shape,
        quantization=config.model.quantization,
        batch=batch,
        adapter=adapter,
        optimizer=optimizer,
        chunked_loss=config.model.fuse and obstacle(skeleton.requires_grad_(False)) is None,
    )
    trained = adapter.trained_numel(shape)
    return MemoryEstimate(
        model=config.model.path,
        quantization=config.model.quantization,
        compute_dtype=compute,
        adapter_dtype=adapter_dtype,
        engine=engine,
        device=device,
        world_size=world_size,
        rows=rows,
        length=batch.length,
        accumulation=accumulation,
        checkpointing=bool(training_argument(config.training, "gradient_checkpointing")),
        without=of_step(checkpointing=False),
        with_checkpointing=of_step(checkpointing=True),
        shards=_shards(optimizer, world_size, trained, adapter_bytes) if engine == "zero2" else {},
    )


def _dtype_of(name: str, automatic: str) -> str:
    return automatic if name == "auto" else name


def _attention(implementation: str) -> Any:
    """The kind of attention; whatever is not known here keeps no square matrix, as flash attention."""
    return implementation if implementation in ("sdpa", "eager") else "flash"


def _optimizer(config: RunConfig, world_size: int, device: str, accumulation: int) -> "Optimizer":
    from dora_dist.memory.step import Optimizer

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


def _shards(optimizer: "Optimizer", world_size: int, trained: int, adapter_bytes: int) -> dict[int, int]:
    found = {}
    for size in sorted({*WORLD_SIZES, world_size}):
        of_size = dataclasses.replace(optimizer, world_size=size)
        found[size] = sum(of_size.parts(trained, adapter_bytes).values()) + adapter_bytes * of_size.shard_numel(trained)
    return found
