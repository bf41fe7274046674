"""The contestants do the same work on the same tensors, and really train."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dora_dist.benchmark.comparison import start, time_in_turns
from dora_dist.benchmark.contestants import Conditions, build, check_gradients, check_same_start
from dora_dist.benchmark.options import ADALORA, DYNAMIC, FLOOR, LORA, PRUNED, build_parser, resolve
from dora_dist.benchmark.peak import PeakMeter
from dora_dist.benchmark.scoring import dense_scores, measure_accuracy, random_layer
from dora_dist.benchmark.shapes import parse_shape
from dora_dist.benchmark.synthetic_base import build_base, random_rows
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.importance import component_scores

CPU = torch.device("cpu")
SHAPE = replace(parse_shape("8b-tiny"), sequence=16, vocabulary=128)
OPTIONS = replace(resolve(build_parser().parse_args(["--quick"])), output=Path())
rows = partial(random_rows, SHAPE, CPU, 0, 0)


@pytest.fixture(scope="module")
def base():
    return build_base(SHAPE, CPU, torch.float32, seed=0)


@pytest.fixture
def make(base):
    def make(name, **changes):
        return build(name, Conditions(base=base, options=OPTIONS, agreement=Agreement(), **changes))

    return make


def test_all_contestants_stand_on_the_same_tensors_and_leave_them_as_they_are(base, make):
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    owned = {id(parameter) for parameter in base.parameters()}
    contestants = start(make, OPTIONS.contestants, rows)
    time_in_turns(contestants, rows, 0, 2, CPU)
    for contestant in contestants.values():
        frozen = {id(p) for p in contestant.model.parameters() if not p.requires_grad and p.numel() > 1}
        assert owned <= frozen
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert not any("lora" in name for name, _ in base.named_modules())


def test_the_base_is_quantized(base):
    inner = [name for name, p in base.named_parameters() if p.dtype == torch.uint8]
    assert len(inner) == 7 * SHAPE.layers


def test_the_floor_trains_nothing_and_its_gradients_pass_every_layer(make):
    floor = make(FLOOR)
    assert floor.parameters == []
    assert floor.optimizer is None
    reached = []
    for layer in floor.model.model.layers:
        layer.mlp.down_proj.register_full_backward_hook(lambda *_: reached.append(1))
    floor.step(rows(0))
    assert len(reached) == SHAPE.layers


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [LORA, ADALORA, DYNAMIC, PRUNED])
def test_adapters_get_gradients_and_move(make, name, checkpointing):
    contestant = make(name, checkpointing=checkpointing)
    contestant.loss(rows(0)).backward()
    assert contestant.parameters
    assert all(parameter.grad is not None for parameter in contestant.parameters)
    assert any(parameter.grad.any() for parameter in contestant.parameters)
    contestant.model.zero_grad()
    before = [parameter.clone() for parameter in contestant.parameters]
    for number in range(2):
        contestant.step(rows(number))
    moved = [not torch.equal(p, old) for p, old in zip(contestant.parameters, before, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_adalora_really_scores_and_prunes(make):
    contestant = make(ADALORA)
    for number in range(3):
        contestant.step(rows(number))
    assert contestant.model.base_model.rankallocator.exp_avg_ipt
    pattern = contestant.model.peft_config["default"].rank_pattern
    kept = sum(sum(mask) for mask in pattern.values())
    assert 0 < kept <= OPTIONS.rank * 7 * SHAPE.layers


def test_before_the_final_event_every_step_scores_and_none_prunes(make):
    contestant = make(DYNAMIC)
    for number in range(3):
        contestant.step(rows(number))
    assert contestant.controller.penalty() is not None
    assert all(scores.any() for scores in contestant.controller.scores.values())
    assert contestant.controller.num_kept == contestant.controller.schedule.num_components
    assert not any(contestant.controller.schedule.is_prune_step(step) for step in range(1, 5000))


def test_after_the_final_event_the_mask_has_the_budget(make):
    contestant = make(PRUNED)
    contestant.prepare(rows)
    assert sum(contestant.kept_ranks()) == OPTIONS.target_rank * 7 * SHAPE.layers
    assert contestant.controller.penalty() is None
    before = contestant.controller.scores
    contestant.step(rows(0))
    assert all(torch.equal(before[name], now) for name, now in contestant.controller.scores.items())


def test_a_step_in_parts_is_a_step(make):
    whole, parts = make(DYNAMIC), make(DYNAMIC)
    for number in range(3):
        whole.step(rows(number))
        seconds = parts.step_in_parts(rows(number), iter(range(100)).__next__)
    assert seconds["step"] > 0
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_contestants_that_do_not_begin_alike_are_refused(make):
    contestants = {LORA: make(LORA), DYNAMIC: make(DYNAMIC)}
    with torch.no_grad():
        for name, parameter in contestants[LORA].model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with pytest.raises(RuntimeError, match="do not start as the same model"):
        check_same_start(contestants, rows(0))


def test_an_adapter_without_a_gradient_is_refused(make):
    contestant = make(LORA)
    contestant.parameters.append(torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"peft-lora: 1 of .* have no gradient"):
        check_gradients({LORA: contestant}, rows(0))


def test_the_peak_counts_what_stays_and_what_a_step_adds():
    meter = PeakMeter()
    kept = torch.zeros(2**18)  # 1 MiB

    def step():
        torch.ones(2**19).sum()  # 2 MiB
        torch.ones(2**18).sum()

    assert meter.of_second(step) == pytest.approx(3 * 2**20, rel=0.01)
    assert kept.numel()


def test_the_dense_definition_is_the_scores_and_both_are_measured_against_float64():
    layer = random_layer(48, 64, 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense_scores(*layer), component_scores(*layer), rtol=1e-5, atol=0)
    accuracy = measure_accuracy(48, 64, 6, torch.Generator().manual_seed(0))
    assert accuracy["opposing_closed_relative_error"] < 1e-5
    assert accuracy["random_closed_relative_error"] < 1e-5
