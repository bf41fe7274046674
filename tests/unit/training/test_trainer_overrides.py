"""The private methods of transformers' Trainer that ours overrides."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from support.tiny_encoders import tiny_classifier
from transformers import Trainer, TrainingArguments

from dora_dist.base_model.losses import class_losses
from dora_dist.training.trainer import DynamicLoraTrainer

OVERRIDDEN = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_wrap_model": ["self", "model", "training", "dataloader"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_rng_state": ["self", "checkpoint"],
    "_run_epoch": [
        *("self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
}
CALLS = {
    "_save_checkpoint": ["save_model(", "_save_optimizer_and_scheduler(", "_save_rng_state(", "state.save_to_json("],
    "_run_epoch": ["iter(train_dataloader)", "_load_rng_state(resume_from_checkpoint)"],
    "train": ["_load_from_checkpoint(", "TrainerState.load_from_json("],
    "_prepare_for_training": ["self._wrap_model(self.model_wrapped)", "use_accelerator_prepare = model is self.model"],
    "_inner_training_loop": ["_prepare_for_training(", "callback_handler.on_train_begin(", "_run_epoch("],
    "_maybe_log_save_evaluate": ["_evaluate(", "control.should_save:", "_save_checkpoint("],
}
"""Method of the Trainer -> what it calls of the above, and what is relied on beside it, in this order."""

ADVICE = (
    "transformers has changed a private method that DynamicLoraTrainer relies on. Compare transformers/trainer.py with "
    "the version that launch/constraints.txt pins: which method saves, prepares and restores now, with which "
    "arguments, and in which order? Then change the overrides at the end of dora_dist/training/trainer.py and "
    "dora_dist/training/checkpointing.py, and this table; tests/e2e/test_resume.py tells whether it is right"
)


def test_no_other_private_method_is_overridden():
    own = {name for name in vars(DynamicLoraTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in own if hasattr(Trainer, name)} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_exists_with_its_parameters(name):
    assert hasattr(Trainer, name), f"Trainer.{name} is gone. {ADVICE}"
    for owner in (Trainer, DynamicLoraTrainer):
        found = list(inspect.signature(getattr(owner, name)).parameters)
        assert found == OVERRIDDEN[name], f"{owner.__name__}.{name} takes {found}, not {OVERRIDDEN[name]}. {ADVICE}"


@pytest.mark.parametrize("name", CALLS)
def test_the_trainer_calls_them_in_the_order_that_is_relied_on(name):
    source = inspect.getsource(getattr(Trainer, name))
    last = -1
    for call in CALLS[name]:
        last = source.find(call, last + 1)
        assert last >= 0, f"Trainer.{name} does not call {call}...) in this order: {CALLS[name]}. {ADVICE}"


def test_a_loss_that_is_divided_by_the_accumulation_steps_is_not_divided_again(tmp_path):
    model = tiny_classifier("bert")
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    trainer.parts = SimpleNamespace(row_losses=class_losses)
    DynamicLoraTrainer._choose_loss_scale(trainer)
    trainer.compute_loss = lambda model, *_, **__: 3 + 0 * model.classifier.weight.sum()
    trainer.current_gradient_accumulation_steps = 4
    assert trainer.training_step(model, {"input_ids": torch.tensor([[1]])}) == 3
