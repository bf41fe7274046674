"""Checks that the launched processes fit the engine, by the launcher's environment variables and the DeepSpeed file
that they name."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

LAUNCH_HINT = {
    "zero2": "accelerate launch --config_file launch/zero2_cpu.yaml (or zero2_gpu.yaml) -m dora_dist.train ...",
    "ddp": "accelerate launch --config_file launch/ddp_gpu.yaml -m dora_dist.train ..., or on CPUs "
    "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m dora_dist.train ..., or under Slurm "
    "DORA_ENGINE=ddp sbatch slurm/many_nodes.sbatch ...",
    "none": "python -m dora_dist.train ...",
}


LAUNCH_FILES = {
    ("zero2", True): "zero2_gpu.yaml",
    ("zero2", False): "zero2_cpu.yaml",
    ("ddp", True): "ddp_gpu.yaml",
}
"""Engine and whether there are GPUs -> the file in ``launch/`` that accelerate starts the ranks of one machine with."""


REPLACING_SECTIONS = {
    "optimizer": "training.optim, training.learning_rate and training.lora_plus_ratio",
    "scheduler": "training.lr_scheduler_type and training.warmup_steps",
    "torch_autocast": "model.compute_dtype",
}
"""Section of a DeepSpeed file that would replace settings of the configuration -> the keys to set instead."""

OFFLOAD_SETTINGS = {
    "offload_optimizer.device": "offload_optimizer_device",
    "offload_param.device": "offload_param_device",
    "cpu_offload": "offload_optimizer_device",
    "cpu_offload_param": "offload_param_device",
}
"""Setting below ``zero_optimization`` of a DeepSpeed file, by its new or old name -> the launcher's option for it."""

ACCELERATE_PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
"""Compute dtype of a run -> accelerate's name for it."""


def check_launch(engine: str, environment: Mapping[str, str]) -> None:
    """Refuse a launch that does not fit the configured engine.

    Args:
        engine: ``distributed.engine`` of the configuration.
        environment: environment variables of this process.

    Raises:
        ValueError: it does not fit; the message names what was found, and the right command.
    """
    check_whole(environment)
    deepspeed = with_deepspeed(environment)
    forced_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    processes = world_size_of(environment)
    hint = f"; start it with: {LAUNCH_HINT[engine]}"
    if engine == "zero2" and forced_cpu:
        raise ValueError(
            "distributed.engine is zero2, but ACCELERATE_USE_CPU is set (accelerate launch --cpu does it), under which "
            f"accelerate silently trains with plain DDP{hint}"
        )
    if engine == "zero2" and not deepspeed:
        raise ValueError(f"distributed.engine is zero2, but this process was not launched with DeepSpeed{hint}")
    if engine == "zero2":
        _check_zero(environment, hint)
    if engine != "zero2" and deepspeed:
        raise ValueError(f"distributed.engine is {engine}, but this process was launched with DeepSpeed{hint}")
    if engine == "none" and processes > 1:
        raise ValueError(f"distributed.engine is none, but {processes} processes were launched{hint}")
    if engine == "ddp" and not launched(environment):
        raise ValueError(f"distributed.engine is ddp, but no launcher started this process{hint}")
    if engine == "ddp" and not forced_cpu and not _gpus():
        raise ValueError(
            "distributed.engine is ddp on CPUs, but ACCELERATE_USE_CPU is not set, without which accelerate takes "
            f"each process for a world of its own{hint}"
        )


def check_precision(compute_dtype: str, environment: Mapping[str, str]) -> None:
    """Refuse a launch that would make accelerate compute in another precision than the run's, or compile the model.

    ``accelerate launch`` sets ``ACCELERATE_MIXED_PRECISION`` and ``ACCELERATE_DYNAMO_BACKEND`` from its options, its
    file, or the user's ``default_config.yaml``; the Trainer obeys them silently. A precision of ``no`` fits every run.

    Args:
        compute_dtype: compute dtype of the run, such as ``float32``; never ``auto``.
        environment: environment variables of this process.

    Raises:
        ValueError: it would; the message names the variable, and the key to set instead.
    """
    where = "of the launch file, of accelerate's default_config.yaml, of accelerate launch, or of the environment"
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", ACCELERATE_PRECISIONS[compute_dtype]):
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION is {precision} (mixed_precision {where}), but the run computes in "
            f"{compute_dtype}: set mixed_precision to no (accelerate launch --mixed_precision no), which leaves it to "
            "model.compute_dtype"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND is {backend} (dynamo_backend {where}), but what the run compiles is in its "
            "configuration: set dynamo_backend to no (accelerate launch --dynamo_backend no), or leave it out, and set "
            "training.torch_compile where that is wanted"
        )


def _check_zero(environment: Mapping[str, str], hint: str) -> None:
    """Refuse settings of ZeRO that are not supported.

    Args:
        environment: environment variables of this process.
        hint: the right launch, for the message.

    Raises:
        ValueError: a setting is not supported (the message names it and where it was made), or the file of settings
            cannot be read.
    """
    path, settings = _deepspeed_file(environment)
    setting = partial(_zero_setting, environment, path, settings)
    where, stage = setting("stage", "zero_stage", "2")
    if str(stage) != "2":
        raise ValueError(
            f"distributed.engine is zero2, but {where} is {stage}, and only stage 2 is supported: set it to 2{hint}"
        )
    for key, option in OFFLOAD_SETTINGS.items():
        where, device = setting(key, option, "none")
        if device not in ("none", "missing", None, False):
            raise ValueError(
                f"distributed.engine is zero2, but {where} is {device}, and events write parameters and the "
                "optimizer's state where the model is: leave it out. An adapter is small, so that offloading would "
                f"save next to nothing (dora-dist estimate has the size){hint}"
            )
    for section, keys in REPLACING_SECTIONS.items():
        if isinstance(settings, dict) and section in settings:
            raise ValueError(
                f"distributed.engine is zero2, but {path} has a section {section}, by which DeepSpeed would replace "
                f"that of the configuration: leave it out, and set {keys}{hint}"
            )


def _zero_setting(
    environment: Mapping[str, str], path: str | None, settings: Any, key: str, option: str, default: str
) -> tuple[str, object]:
    """Where a setting of ZeRO was made, and the setting, by the rules of accelerate 1.15: a file counts, whatever
    options the launcher was given, unless its setting is ``auto``.

    Args:
        environment: environment variables of this process.
        path: path of the DeepSpeed file; None where there is none.
        settings: contents of the file.
        key: name of the setting below ``zero_optimization`` in a file.
        option: name of the launcher's option for it.
        default: the launcher's default.
    """
    of_launcher = environment.get(f"ACCELERATE_DEEPSPEED_{option.upper()}", default)
    if path is None:
        return f"the launcher's {option}", of_launcher
    value = settings
    for name in ("zero_optimization", *key.split(".")):
        value = value.get(name, "missing") if isinstance(value, dict) else "missing"
    return f"zero_optimization.{key} in {path}", of_launcher if value == "auto" else value


def _deepspeed_file(environment: Mapping[str, str]) -> tuple[str | None, Any]:
    """Path and contents of the DeepSpeed file that the launcher names; None for both if it names none.

    Raises:
        ValueError: the file cannot be read.
    """
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return None, None
    try:
        return path, json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the DeepSpeed file {path} (deepspeed_config_file of the launch file) cannot be read from {Path.cwd()}: "
            f"{error}; start it with: {LAUNCH_HINT['zero2']}"
        ) from None


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as a rank.

    ``LOCAL_RANK`` shows it; accelerate too decides by it whether a process joins others. torchrun, deepspeed,
    ``slurm/rank.sh`` and ``accelerate launch`` (of several processes, or with DeepSpeed) set it, with ``RANK`` and
    ``WORLD_SIZE``. ``accelerate launch`` of one process without DeepSpeed and ``srun`` by itself set none of them.
    Schedulers of containers set ``RANK`` and ``WORLD_SIZE`` for a container in which a launcher has yet to start.
    """
    return "LOCAL_RANK" in environment


def with_deepspeed(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher has started this process for DeepSpeed; by the rule of accelerate 1.15."""
    return environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_whole(environment: Mapping[str, str]) -> None:
    """Refuse a process that is one of several by ``WORLD_SIZE``, but alone by :func:`launched`.

    Raises:
        ValueError: it is such a process; the message names what is set, and what is missing.
    """
    if not launched(environment) and "RANK" in environment and world_size_of(environment) > 1:
        raise ValueError(
            f"RANK is {environment['RANK']} and WORLD_SIZE is {environment['WORLD_SIZE']}, but LOCAL_RANK is not set, "
            "without which this process would train alone: set it too (0 for the first process of a machine), or let "
            "torchrun, accelerate launch or slurm/rank.sh set all three"
        )


def world_size_of(environment: Mapping[str, str]) -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))


def check_world_size(world_size: int, engine: str) -> None:
    """Refuse a ``--world-size`` that the engine cannot have.

    Raises:
        ValueError: the engine cannot have it; the message names the key to change.
    """
    if world_size < 1:
        raise ValueError(f"--world-size is {world_size}, but must be at least 1")
    if engine == "none" and world_size > 1:
        raise ValueError(
            f"--world-size is {world_size}, but distributed.engine is none, which is one process: set "
            "distributed.engine to zero2 or ddp"
        )


def _gpus() -> bool:
    import torch  # here, because no other check needs it

    return torch.cuda.is_available()
