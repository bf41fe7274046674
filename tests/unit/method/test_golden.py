"""The method against a trajectory of the authors' released code; shared/golden/README.md tells its origin."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.allocation import select_components
from dora_dist.importance import component_scores, smooth
from dora_dist.method.schedule import FIRST_SCORED_STEP
from dora_dist.regularizer import equilibrium_penalty
from dora_dist.schedule import BudgetSchedule

# The golden values are float32, computed by dense matrices of at most 24 x 24.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-8}


@pytest.fixture(scope="module")
def golden(shared) -> SimpleNamespace:
    """Settings as attributes, ``tensors`` by the keys of the README."""
    settings = json.loads((shared / "golden" / "golden.json").read_text())
    return SimpleNamespace(tensors=load_file(shared / "golden" / "golden.safetensors"), **settings)


@pytest.fixture(scope="module")
def schedule(golden) -> BudgetSchedule:
    return make_schedule(golden, golden.max_step)


def make_schedule(golden, total_steps: int) -> BudgetSchedule:
    return BudgetSchedule(
        total_steps=total_steps,
        num_layers=len(golden.names),
        initial_rank=golden.start_rank,
        target_rank=golden.end_avg_rank,
        warmup_fraction=golden.start_ratio,
        final_fraction=golden.end_ratio,
        interval=golden.interval,
    )


def weights(golden, layer: int, step: int) -> tuple[Tensor, Tensor]:
    return golden.tensors[f"A.{layer}"][step].float(), golden.tensors[f"B.{layer}"][step].float()


def scores_after(golden, step: int) -> Tensor:
    """Our scores after step ``step`` (from 1) of all layers, shape ``(L, r)``."""
    scores = []
    for layer, gate in enumerate(golden.tensors["traj.c_in"][step - 1]):
        lora_a, lora_b = weights(golden, layer, step)
        scores.append(component_scores(lora_a, gate, lora_b))
    return torch.stack(scores)


def events(golden) -> list[int]:
    return (golden.tensors["step.event"].nonzero().flatten() + 1).tolist()


def authors_selection(golden, step: int) -> dict[str, Tensor]:
    """Layer -> components at or under the authors' threshold, which they prune."""
    return dict(zip(golden.names, golden.tensors["traj.le_threshold"][step - 1].bool(), strict=True))


def our_selection(golden, schedule, step: int) -> dict[str, Tensor]:
    """Layer -> components that we prune, given the authors' smoothed scores."""
    smoothed = dict(zip(golden.names, golden.tensors["traj.ema"][step - 1], strict=True))
    keep = select_components(smoothed, schedule.num_components - schedule.num_pruned(step))
    return {name: ~keep[name] for name in golden.names}


def test_scores_are_those_of_the_released_code(golden):
    ours = torch.stack([scores_after(golden, step) for step in range(1, golden.max_step + 1)])
    torch.testing.assert_close(ours, golden.tensors["traj.raw"], **FLOAT32)


def test_smoothed_scores_are_those_of_the_released_code_until_the_final_event(golden, schedule):
    smoothed = torch.zeros(len(golden.names), golden.start_rank, dtype=torch.float64)
    for step in range(1, schedule.final_step + 1):
        smoothed = smooth(smoothed, scores_after(golden, step), golden.beta)
        expected = golden.tensors["traj.ema"][step - 1].double()
        torch.testing.assert_close(smoothed, expected, msg=lambda text, step=step: f"step {step}: {text}", **FLOAT32)


def test_events_and_pruned_counts_are_those_of_the_released_code(golden, schedule):
    assert schedule.prune_steps == events(golden)
    assert schedule.final_step == events(golden)[-1]
    for step in events(golden):
        assert schedule.num_pruned(step) == golden.tensors["step.n_scheduled"][step - 1]


def test_positions_are_those_of_the_released_code_for_awkward_run_lengths(golden):
    ended = 0
    for length, positions in golden.get_prune_step.items():
        schedule = make_schedule(golden, int(length))
        if any(position == last for position, last in positions[:FIRST_SCORED_STEP]):
            assert schedule.final_step == FIRST_SCORED_STEP, length  # where the code of the paper would end earlier
            continue
        removable = schedule.num_components - schedule.final_num_kept
        for step, (position, last) in enumerate(positions):  # from step 0; of long runs the first steps only
            within = 0 <= position <= last
            due = within and (position % golden.interval == 0 or position == last)
            assert schedule.is_prune_step(step) == due, (length, step)
            if within:
                assert schedule.num_pruned(step) == removable * position**3 // last**3, (length, step)
            if position == last:
                assert schedule.final_step == step, length
                ended += 1
    assert ended >= 5


def test_the_penalty_is_that_of_the_released_code_until_the_final_event(golden, schedule):
    for step in range(1, schedule.final_step + 1):
        penalty = equilibrium_penalty(weights(golden, layer, step - 1) for layer in range(len(golden.names)))
        expected = golden.tensors["step.reg"][step - 1]
        torch.testing.assert_close(penalty, expected, msg=lambda text, step=step: f"step {step}: {text}", **FLOAT32)
    assert not golden.tensors["step.reg"][schedule.final_step :].any()


def test_the_same_components_are_pruned_where_the_authors_prune_as_scheduled(golden, schedule):
    compared = 0
    for step in events(golden):
        theirs, ours = authors_selection(golden, step), our_selection(golden, schedule, step)
        if sum(int(mask.sum()) for mask in theirs.values()) == schedule.num_pruned(step):
            compared += 1
            for name in golden.names:
                assert torch.equal(ours[name], theirs[name]), (step, name)
    assert compared >= 5


def test_exactly_the_scheduled_components_are_pruned_where_the_authors_prune_more(golden, schedule):
    compared = 0
    for step in events(golden):
        theirs, ours = authors_selection(golden, step), our_selection(golden, schedule, step)
        if sum(int(mask.sum()) for mask in theirs.values()) > schedule.num_pruned(step):
            compared += 1
            assert sum(int(mask.sum()) for mask in ours.values()) == schedule.num_pruned(step)
            assert not any((ours[name] & ~theirs[name]).any() for name in golden.names), step
    assert compared >= 3


def test_the_final_mask_is_that_of_the_released_code_from_our_own_scores(golden, schedule):
    smoothed = torch.zeros(len(golden.names), golden.start_rank, dtype=torch.float64)
    for step in range(1, schedule.final_step + 1):
        smoothed = smooth(smoothed, scores_after(golden, step), golden.beta)
    keep = select_components(dict(zip(golden.names, smoothed, strict=True)), schedule.final_num_kept)
    assert torch.equal(torch.stack([~keep[name] for name in golden.names]), golden.tensors["final_mask"].bool())


def test_the_forward_is_that_of_the_released_code(golden):
    out_features, in_features = golden.tensors["fwd.W"].shape
    base = nn.Linear(in_features, out_features)
    layer = DynamicLoraLinear(
        base,
        "default",
        config=SimpleNamespace(lora_dropout=golden.dropout),
        r=golden.start_rank,
        lora_alpha=golden.lora_alpha,
    )
    final_a, final_b = weights(golden, 1, golden.max_step)
    values = {
        base.weight: golden.tensors["fwd.W"],
        base.bias: golden.tensors["fwd.bias"],
        layer.lora_a: final_a,
        layer.lora_b: final_b,
        layer.gate: golden.tensors["traj.c_out"][-1, 1],
    }
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)
        layer.component_mask.copy_(~golden.tensors["final_mask"][1].bool())
        torch.testing.assert_close(layer(golden.tensors["fwd.x"]), golden.tensors["fwd.y"], rtol=1e-5, atol=1e-6)
