"""Trainings by transformers' own Trainer, in the size of a test."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dora_dist import DynamicLoraConfig, DynamicRankCallback, PruningConfig, add_dynamic_lora
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.distributed.world import connect
from support.forked_run import LAUNCHED_AS
from support.tiny_models import VOCABULARY, load_base

TARGET, INITIAL, STEPS = 2, 4, 8
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def rows(count: int = 40) -> Dataset:
    """Random tokens, of one length so that no batch is padded."""
    ids = torch.randint(4, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def adapted(folder: Path | str, quantization: str = "nf4", **changes: Any) -> DynamicLoraModel:
    """The model saved in ``folder`` with a fresh adapter, of which 7 layers in each of 2 blocks have a part."""
    config = {"target_rank": TARGET, "initial_rank": INITIAL, "dropout": 0.0, "seed": 5, **changes}
    return add_dynamic_lora(load_base(folder, quantization), DynamicLoraConfig(**config))


def make_trainer(
    model: DynamicLoraModel, callback: DynamicRankCallback | None, output: Path | str, **changes: Any
) -> Trainer:
    callbacks = [] if callback is None else [callback]
    arguments = TrainingArguments(output_dir=str(output), **{**SETTINGS, **changes})
    return Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)


def state_of(model: DynamicLoraModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def train_on_rank(model: str, output: str, pruning: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A training by the real Trainer on this rank of a world; see :func:`make_trainer`.

    Args:
        model: folder of the base.
        output: of the trainer.
        pruning: what :class:`PruningConfig` takes.
        options: ``init`` of the callback, ``resume`` (a checkpoint), ``zero2`` (train under it), and settings.
    """
    settings = dict(options)
    init, resume, zero2 = settings.pop("init", None), settings.pop("resume", None), settings.pop("zero2", False)
    if zero2:
        os.environ.update(LAUNCHED_AS["zero2"], MASTER_PORT="29500")
        connect("zero2", 2)  # left to itself on a CPU, accelerate believes in a world of one
        settings |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    adapter = adapted(model)
    callback = DynamicRankCallback(PruningConfig(**pruning), init=init)
    trainer = make_trainer(adapter, callback, output, **settings)
    trainer.train(resume_from_checkpoint=resume)
    assert callback.controller is not None
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "state": state_of(adapter),
        "ranks": callback.controller.ranks,
        "events": [event.step for event in callback.events],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "loss" in line],
    }
