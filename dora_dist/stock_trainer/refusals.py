"""Refuses trainers and settings with which the method would silently be wrong."""

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerState, TrainingArguments

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.pruning import PRUNE, PruningConfig, check_prunes, check_slots

ENGINES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)


def check_model(model: nn.Module | None) -> DynamicLoraModel:
    """The trainer's model, with its type checked.

    Raises:
        ValueError: it was not made by ``add_dynamic_lora``.
    """
    if not isinstance(model, DynamicLoraModel):
        raise ValueError(
            f"the trainer's model is a {type(model).__name__}, but DynamicRankCallback prunes the one that "
            "add_dynamic_lora(base, DynamicLoraConfig(...)) returns: give that to the trainer, without a peft_config"
        )
    return model


def check_pruning(pruning: PruningConfig, adapter: DynamicLoraConfig) -> None:
    """Refuse pruning settings that this callback does not support.

    Raises:
        ValueError: a setting is not supported; the message names its key.
    """
    if pruning.rule != PRUNE:
        raise ValueError(
            f"pruning.rule is {pruning.rule}, but DynamicRankCallback prunes: omit the callback if ranks stay fixed, "
            f"or set rule to {PRUNE}"
        )
    check_slots(pruning, adapter)
    check_prunes(pruning, adapter)


def check_settings(arguments: TrainingArguments, state: TrainerState) -> None:
    """Refuse trainer settings that do not work with the callback.

    Raises:
        ValueError: a setting does not work; the message names it and says what to do.
    """
    if arguments.fp16:
        raise ValueError(
            "fp16 is true, which scales gradients by a varying factor, so penalty and scores would have another weight "
            "in every step: set bf16 to true instead"
        )
    if arguments.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size is true, so training may start again with an adapter that is already trained: "
            "set it to false, and per_device_train_batch_size to what fits"
        )
    if arguments.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end is true, but a checkpoint from before the last pruning event may be the best, and "
            "does not meet the budget: set it to false, and take one of the checkpoints from the last event on (each "
            "is a plain LoRA adapter) by the figures in trainer.state.log_history; dora-dist train has "
            "evaluation.keep_best"
        )
    if state.is_hyper_param_search:
        raise ValueError(
            "the trainer searches hyperparameters, but every trial needs its own model and callback: make a "
            "trainer for each trial"
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs, over which the trainer copies the model (DataParallel); the "
            "copies' gradients are lost to the callback: start one process for each GPU (accelerate launch), or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    check_engine(AcceleratorState())


def check_engine(accelerator: AcceleratorState) -> None:
    """Refuse engines that shard parameters, or keep master copies that the callback cannot reach.

    Raises:
        ValueError: the engine is such a one; the message names it.
    """
    engine = accelerator.distributed_type
    stage = accelerator.deepspeed_plugin.zero_stage if engine == DistributedType.DEEPSPEED else None
    if engine not in ENGINES or stage not in (None, 2):
        found = engine.value if stage is None else f"ZeRO stage {stage}"
        raise ValueError(
            f"the trainer runs under {found}, but components are pruned in one process, under DDP, or under ZeRO "
            "stage 2: choose one of these in the configuration of accelerate or DeepSpeed"
        )


def check_dtype(model: DynamicLoraModel) -> None:
    """Refuse an adapter in 16 bits, or one that was cast, if no engine keeps a float32 copy of it.

    Raises:
        ValueError: the adapter is such a one; the message names the dtypes.
    """
    if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        return
    if model.adapter_dtype.itemsize < torch.float32.itemsize:
        raise ValueError(
            f"the adapter was made in {model.adapter_dtype} (DynamicLoraConfig(dtype={model.dynamic_config.dtype!r})), "
            "of which no engine keeps a float32 copy here, so that updates too small for 16 bits, such as those of a "
            'gate near 1, would be lost: set dtype to "float32", or train under ZeRO stage 2'
        )
    found = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} - {model.adapter_dtype}
    if found:
        raise ValueError(
            f"parameters of the adapter are {', '.join(sorted(map(str, found)))}, but were made in "
            f"{model.adapter_dtype}: TRL casts those on a quantized base, which loses small updates of the gates. "
            "Give the callback to the trainer as callbacks=[...], where it undoes the cast, and not by add_callback"
        )
