"""Trainings by transformers' own Trainer, in the size of a test."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dora_dist import DynamicLoraConfig, DynamicRankCallback, PruningConfig, add_dynamic_lora
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.distributed.world import connect
from support.forked_run import LAUNCHED_AS
from support.tiny_models import VOCABULARY, load_base

TARGET, INITIAL, STEPS = 2, 4, 8
PRUNING: dict[str, Any] = {"interval": 1, "warmup_fraction": 0.1, "final_fraction": 0.5}
"""Events after steps 1 to 4."""
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def rows(count: int = 40) -> Dataset:
    """Rows of random tokens, all of one length, so that no batch is padded."""
    ids = torch.randint(4, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def adapted(folder: Path | str, quantization: str = "none", **changes: Any) -> DynamicLoraModel:
    """The model saved in ``folder`` with a fresh adapter on the 7 linear layers of each of its 2 blocks."""
    config = {"target_rank": TARGET, "initial_rank": INITIAL, "dropout": 0.0, "seed": 5, **changes}
    return add_dynamic_lora(load_base(folder, quantization), DynamicLoraConfig(**config))


def make_trainer(
    model: DynamicLoraModel, callback: DynamicRankCallback | None, output: Path | str, **changes: Any
) -> Trainer:
    callbacks = [] if callback is None else [callback]
    arguments = TrainingArguments(output_dir=str(output), **{**SETTINGS, **changes})
    return Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)


class FirstGradients(TrainerCallback):
    """Gradients of the first optimizer step, by the names of the parameters; none where an engine keeps them."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        if not self.gradients:
            trained = model.named_parameters()
            self.gradients = {name: value.grad.clone() for name, value in trained if value.grad is not None}


def state_of(model: DynamicLoraModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def train_on_rank(model: str, output: str, pruning: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A training by the real Trainer on this rank of a world; see :func:`make_trainer`.

    Args:
        model: folder of the base.
        output: the trainer's output folder.
        pruning: arguments of :class:`PruningConfig`.
        options: ``init`` of the callback, ``resume`` (a checkpoint), ``zero2`` (whether to train under it), and
            settings.
    """
    settings = dict(options)
    init, resume, zero2 = settings.pop("init", None), settings.pop("resume", None), settings.pop("zero2", False)
    if zero2:
        os.environ.update(LAUNCHED_AS["zero2"], MASTER_PORT="29500")
        connect("zero2", 2)  # left to itself on a CPU, accelerate believes in a world of one
        settings |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    adapter = adapted(model, "nf4")
    callback = DynamicRankCallback(PruningConfig(**pruning), init=init)
    trainer = make_trainer(adapter, callback, output, **settings)
    seen = FirstGradients()
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=resume)
    assert callback.controller is not None
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "gradients": seen.gradients,
        "state": state_of(adapter),
        "ranks": callback.controller.ranks,
        "events": [event.step for event in callback.events],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in trainer.state.log_history if "loss" in line],
    }
