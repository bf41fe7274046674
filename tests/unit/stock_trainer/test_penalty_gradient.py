"""What the callback adds to gradients, against the formula."""

import pytest
import torch
from support.same_gradients import assert_same_gradients
from support.stock_trainer import PRUNING, FirstGradients, adapted, make_trainer
from support.tiny_models import shake, tiny_model, trainable
from support.tiny_run import save_tiny_model

from dora_dist import DynamicRankCallback, PruningConfig
from dora_dist.regularizer import equilibrium_penalty

WEIGHT = 30.0
"""So large that the penalty's gradient is as large as that of the loss."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def first_gradients(base, output, weight, **settings):
    """Those of a training, and the model as it was before."""
    callback, seen = DynamicRankCallback(PruningConfig(**PRUNING, equilibrium_weight=weight)), FirstGradients()
    trainer = make_trainer(model := shake(adapted(base)), callback, output, **settings)
    trainer.add_callback(seen)
    trainer.train()
    assert not callback._penalty or not callback._penalty._hooks, "hooks are left behind"
    assert seen.gradients.keys() == trainable(model).keys()
    return seen.gradients


@pytest.mark.parametrize("batch", [(4, 1), (2, 2), (1, 4)], ids=lambda batch: f"{batch[0]} x {batch[1]}")
def test_the_penalty_enters_once_a_step_whatever_the_accumulation(base, tmp_path, batch):
    settings = {"per_device_train_batch_size": batch[0], "gradient_accumulation_steps": batch[1]}
    found = first_gradients(base, tmp_path, WEIGHT, **settings)
    model = shake(adapted(base))
    layers = model.adapted_layers().values()
    penalty = WEIGHT * equilibrium_penalty([(layer.lora_a, layer.lora_b) for layer in layers])
    without = first_gradients(base, tmp_path, 0.0, per_device_train_batch_size=4)
    names = [name for name in trainable(model) if "lora_gate" not in name]
    share = dict(zip(names, torch.autograd.grad(penalty, [trainable(model)[name] for name in names]), strict=True))
    expected = {name: value + share.get(name, torch.zeros_like(value)) for name, value in without.items()}
    assert_same_gradients(found, expected, 1e-4)
    assert any(part.norm() > 0.3 * without[name].norm() for name, part in share.items()), "the test would prove nothing"


def test_a_step_of_fewer_micro_batches_has_the_whole_penalty():
    """The last step of an epoch may have; the number is not told to a callback."""
    from support.tiny_models import adapt, tokens

    from dora_dist.distributed.agreement import Agreement
    from dora_dist.method.budget import Budget
    from dora_dist.schedule import BudgetSchedule
    from dora_dist.stock_trainer.penalty_gradient import PenaltyGradient
    from dora_dist.training.controller import DynamicRankController

    model = shake(adapt(tiny_model()))
    layers = model.adapted_layers()
    schedule = BudgetSchedule(total_steps=10, num_layers=len(layers), initial_rank=3, target_rank=2, interval=2)
    controller = DynamicRankController(layers, Budget(schedule, dict.fromkeys(layers, 1)), Agreement())
    found = []
    for micro_batches in (1, 3):
        penalty = PenaltyGradient(controller, WEIGHT)
        penalty.begin_step()
        model.zero_grad()
        for _ in range(micro_batches):
            (model(input_ids=tokens(), labels=tokens()).loss / micro_batches).backward()
        penalty.end()
        found.append({name: value.grad.clone() for name, value in trainable(model).items()})
    assert_same_gradients(found[1], found[0], 1e-4)
