"""What is decided of a run whose events give layers new components."""

import torch
from support.resolved_run import load, resolved
from support.tiny_run import tiny_tokenizer, write_run

from dora_dist.distributed.agreement import Agreement
from dora_dist.setup.build import build_controller, load_model
from dora_dist.setup.describe import banner, describe
from dora_dist.training.criterion import LayerSensitivity
from dora_dist.training.rules.grow import Grow


def test_one_key_makes_a_run_that_grows_and_the_dry_run_says_when(config):
    grow = {"adapter": {"initial_rank": None}, "pruning": {"rule": "grow"}}
    settings = load(write_run(config.parent, {"data": {"train": str(config.parent / "train.jsonl")}}, grow))
    assert (settings.adapter.initial_rank, settings.adapter.slots) == (1, 4)
    run = resolved(settings)
    told = "budget of 14 components, grown after steps (step: components that there are then)\n  1: 14, 2: 14, 4: 21,"
    assert f"{told} 6: 28" in describe(settings, run, 1)
    line = "14 components that grow to 28, in layers of 4 slots: like LoRA of rank 2, scale 2.00"
    assert line in banner(settings, run, 1)
    model = load_model(settings, torch.device("cpu"), tiny_tokenizer())
    controller = build_controller(settings.pruning, 0, model, Agreement(), run.budget)
    assert isinstance(controller.rule, Grow)
    assert isinstance(controller.criterion, LayerSensitivity)
    assert controller.num_kept == run.budget.initial == 14
    assert run.budget.final == 28
    assert {len(layer.gate) for layer in controller.layers.values()} == {4}
