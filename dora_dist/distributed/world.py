"""Joining the processes of a run, and proving that they really form the one world that was asked for.

Each check stands for a way in which ranks can train alone, or under another engine than the configured one, while the
log looks fine.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from dora_dist.console.errors import ExpectedRunError, PreemptedError
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import deepspeed_of, engine_of
from dora_dist.distributed.heartbeat import HeartbeatMonitor


@contextmanager
def joined(engine: str, timeout_minutes: float, monitor: HeartbeatMonitor) -> Iterator[Agreement]:
    """The process group of a run, from the moment that its ranks join it until all of them leave it together.

    Ranks leave together when the block ends, also by a preemption, which all of them raise. After any other error
    some rank may be stuck, so no rank waits for the others.

    Args:
        engine: see :func:`connect`.
        timeout_minutes: see :func:`connect`.
        monitor: heartbeat monitor of the ranks, which stops when they leave.
    """
    state = connect(engine, timeout_minutes)
    assert state.device is not None
    agreement = Agreement(state.device, monitor, host_group(timedelta(minutes=timeout_minutes)))
    try:
        yield agreement
    except PreemptedError:
        agreement.close()
        raise
    agreement.close()


def connect(engine: str, timeout_minutes: float) -> PartialState:
    """Join the process group before ``TrainingArguments`` can set up another one.

    Left to itself under DeepSpeed on CPUs, accelerate takes each process for a world of one, so that all ranks train on
    the same data. The state made here is the one that it then uses (``use_configured_state``).

    Args:
        engine: ``distributed.engine``, for which :func:`~dora_dist.distributed.launcher.check_launch` has passed.
        timeout_minutes: longest time that a rank waits for the others in a collective.

    Raises:
        ValueError: DeepSpeed is told to use the CPU, but there are GPUs.
    """
    gpus = torch.cuda.is_available()
    if gpus and os.environ.get("DS_ACCELERATOR") == "cpu":
        raise ValueError(
            "DS_ACCELERATOR is cpu, but there are GPUs: unset it, or hide them with CUDA_VISIBLE_DEVICES=-1"
        )
    if engine == "zero2" and not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        use_gloo_only()
    if engine == "none":
        return PartialState()
    timeout = timedelta(minutes=timeout_minutes)
    if gpus:
        return PartialState(timeout=timeout)
    # accelerate wants cpu=True for DDP on CPUs, and not for DeepSpeed on CPUs.
    return PartialState(cpu=engine == "ddp", backend="gloo", timeout=timeout)


def host_group(timeout: timedelta) -> torch.distributed.ProcessGroup | None:
    """A gloo group of all ranks, for exchanges of values in host memory if the process group serves GPUs only.

    Through NCCL a flag would be copied to the GPU and back, and the host would wait for all earlier work of the GPU.
    All ranks must call this together, after any code has made the process group; this group ends with that one.

    Args:
        timeout: longest time that a rank waits for the others in an exchange.

    Returns:
        The group; None if the process group serves the CPU itself, or if there is no process group.

    Raises:
        ExpectedRunError: the ranks cannot reach each other over gloo.
    """
    if not torch.distributed.is_initialized() or "cpu:" in torch.distributed.get_backend_config():
        return None
    try:
        group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise ExpectedRunError(
            "the ranks, which exchange flags and digests over gloo beside "
            f"{torch.distributed.get_backend()}, could not reach each other: {str(error).splitlines()[0]} Set "
            "GLOO_SOCKET_IFNAME to the network interface between the nodes"
        ) from None
    return group


def join_at_file(meeting: Path, rank: int, size: int, device: torch.device) -> Agreement:
    """Join a process group on this machine without a launcher, for measurements; returns the agreement of its ranks.

    Args:
        meeting: path of a file that does not exist yet, the same for all ranks.
        rank: rank of this process.
        size: number of ranks.
        device: device on which tensors are exchanged.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=meeting.as_uri(), rank=rank, world_size=size)
    return Agreement(device, host_group=host_group(timedelta(minutes=30)))


def use_gloo_only() -> None:
    """Switch off DeepSpeed's shared-memory collectives for CPUs, which it compiles at the first start: they need a
    compiler and Python's headers, and gain nothing at the size of an adapter."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_world(agreement: Agreement, arguments: Any, accelerator: Any) -> None:
    """Assert that the environment, the process group, the Trainer's arguments and its accelerator count the same number
    of processes.

    Raises:
        RankFailedError: on all ranks, if they do not.
    """
    counts = {
        "WORLD_SIZE": int(os.environ.get("WORLD_SIZE", "1")),
        "the process group": agreement.size,
        "TrainingArguments": arguments.world_size,
        "accelerate": accelerator.num_processes,
    }
    failure = None
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{who} {count}" for who, count in counts.items())
        failure = f"the number of processes is not the same everywhere: {listed}"
    agreement.raise_together(failure, "joining the world")


def buffer_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every floating-point buffer of a model, by its name."""
    return {name: buffer.dtype for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def check_prepared(
    agreement: Agreement, trainer: Any, engine: str, dtype: torch.dtype, buffers: Mapping[str, torch.dtype]
) -> None:
    """Assert at step 0 that the engine is the one asked for, with the settings asked for, on different data per rank,
    and that it has rounded no buffer.

    Args:
        agreement: collectives over the ranks.
        trainer: the trainer, after its model has been wrapped.
        engine: ``distributed.engine`` of the configuration.
        dtype: dtype that the adapter's parameters must have.
        buffers: :func:`buffer_dtypes` of the model before it was wrapped.

    Raises:
        RankFailedError: on all ranks, if any of this does not hold.
    """
    wrapped = trainer.model_wrapped
    failures = []
    if engine_of(wrapped) != engine:
        found = engine_of(wrapped)
        hint = "; let the process see one GPU only (CUDA_VISIBLE_DEVICES)" if found == "dp" else ""
        failures.append(f"distributed.engine is {engine}, but the model is wrapped by {found}{hint}")
    elif engine == "zero2":
        failures += _deepspeed_mismatches(wrapped, trainer.args)
    else:
        failures += _accelerate_mismatches(trainer.accelerator, trainer.args)
    wrong = {
        name: p.dtype
        for name, p in trainer.model.named_parameters()
        if any(part in name for part in (".lora_", ".modules_to_save.", ".token_adapter.trainable_tokens_delta."))
        and p.dtype != dtype
    }
    if wrong:
        name, found = next(iter(wrong.items()))
        failures.append(f"adapter.dtype is {dtype}, but {len(wrong)} adapter parameters such as {name} are {found}")
    failures += _rounded_buffers(buffers, buffer_dtypes(trainer.model))
    agreement.raise_together("; ".join(failures) or None, "preparing the engine")
    _check_data_differs(agreement, trainer.callback_handler.train_dataloader)


def set_engine_timeout(minutes: float) -> None:
    """Let DeepSpeed's collectives wait as long as the others: it makes a separate process group, with the backend's
    default time-out. Must be called after the engine has been made."""
    from deepspeed.utils import groups

    timeout = timedelta(minutes=minutes)
    # torch has no public way to change a time-out, and DeepSpeed none to choose it.
    torch.distributed.distributed_c10d._set_pg_timeout(timeout, groups._get_data_parallel_group())


def _deepspeed_mismatches(wrapped: nn.Module, arguments: Any) -> list[str]:
    """Settings of the engine that differ from the Trainer's."""
    engine = deepspeed_of(wrapped)
    pairs = {
        "gradient clipping": (engine.gradient_clipping(), arguments.max_grad_norm),
        "gradient accumulation": (engine.gradient_accumulation_steps(), arguments.gradient_accumulation_steps),
        "batch per process": (engine.train_micro_batch_size_per_gpu(), arguments.per_device_train_batch_size),
        "bfloat16": (engine.bfloat16_enabled(), arguments.bf16),
        "float16": (engine.fp16_enabled(), False),
    }
    return [
        f"DeepSpeed's {name} is {found}, the Trainer's is {wanted} (write 'auto' in the DeepSpeed configuration)"
        for name, (found, wanted) in pairs.items()
        if found != wanted
    ]


def _accelerate_mismatches(accelerator: Any, arguments: Any) -> list[str]:
    """The precision in which accelerate lets the model compute, if it differs from the Trainer's."""
    found, wanted = accelerator.mixed_precision, "bf16" if arguments.bf16 else "no"
    if found == wanted:
        return []
    return [
        f"accelerate's mixed precision is {found}, the Trainer's is {wanted} (unset ACCELERATE_MIXED_PRECISION; "
        "model.compute_dtype says it)"
    ]


def _rounded_buffers(before: Mapping[str, torch.dtype], after: Mapping[str, torch.dtype]) -> list[str]:
    """A message about buffers to which an engine has given less precision, if there are any.

    DeepSpeed before 0.19.2 casts all buffers to bfloat16 with the parameters; later versions cast them to
    ``data_types.buffer_dtype``. With rotary frequencies in bfloat16, the angle at position 512 is wrong by 0.9 rad.
    Casting some to float32 (``data_types.keep_in_fp32_modules``) loses nothing.
    """
    lost = [name for name, dtype in before.items() if torch.promote_types(dtype, after[name]) != after[name]]
    if not lost:
        return []
    return [
        f"the engine has cast {len(lost)} buffers such as {lost[0]} from {before[lost[0]]} to {after[lost[0]]}, which "
        "makes positions wrong where they are rotary frequencies: take data_types.buffer_dtype out of the DeepSpeed "
        "configuration, and use DeepSpeed 0.19.2 or newer"
    ]


def _check_data_differs(agreement: Agreement, dataloader: Any) -> None:
    """Compare the indices of each rank's first batch. The order is a pure function, so reading it changes nothing."""
    first = tuple(next(iter(dataloader.batch_sampler)))
    batches = agreement.gather(first)
    failure = None
    if len(set(batches)) < len(batches):
        same = [rank for rank, batch in enumerate(batches) if batch == first]
        failure = f"ranks {same} are given the same examples {list(first)}" if len(same) > 1 else None
    agreement.raise_together(failure, "sharing the data")
