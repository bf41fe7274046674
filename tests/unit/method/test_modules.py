"""The choice of whole modules against brute force over all choices of a block."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.method.layer_names import split_name
from dora_dist.method.modules import select_modules

KINDS = ("q", "k", "up", "down")


@st.composite
def models(draw):
    names = [f"model.layers.{block}.mlp.{kind}" for block in range(draw(st.integers(1, 3))) for kind in KINDS]
    values = st.lists(st.sampled_from([0.0, 0.5, -1.0]) | st.floats(-1, 1), min_size=2, max_size=2)
    scores = {name: torch.tensor(draw(values), dtype=torch.float64) for name in names}
    costs = {name: {"q": 2, "k": 3, "up": 5, "down": 5}[name.rsplit(".", 1)[-1]] for name in names}
    return scores, costs


@settings(max_examples=100, deadline=None)
@given(models(), st.integers(1, 4), st.integers(2, 6), st.booleans())
def test_the_best_modules_of_every_block_stay_and_spend_the_budget(model, per_block, rank, in_parameters):
    scores, costs = model
    costs = costs if in_parameters else dict.fromkeys(scores, 1)
    budget = rank * sum(costs.values())
    plan = select_modules(scores, costs, budget, per_block)
    for block in {split_name(name).block for name in scores}:
        names = [name for name in scores if split_name(name).block == block]
        kept = [name for name in names if name in plan]
        best = max(sum(float(scores[n].sum()) for n in some) for some in combinations(names, per_block))
        assert len(kept) == per_block
        assert sum(float(scores[name].sum()) for name in kept) == pytest.approx(best, abs=1e-12)
    spent = sum(costs[name] * rank for name, rank in plan.items())
    assert 0 <= budget - spent < max(costs[name] for name in plan)
    assert max(plan.values()) - min(plan.values()) <= 1
    assert select_modules(dict(reversed(scores.items())), costs, budget, per_block) == plan


def test_all_modules_of_all_blocks_are_a_uniform_rank():
    names = [f"layers.{block}.{kind}" for block in range(2) for kind in KINDS]
    scores = {name: torch.rand(3) for name in names}
    costs = {name: 2 + len(name) for name in names}
    assert select_modules(scores, costs, 4 * sum(costs.values()), 4) == dict.fromkeys(names, 4)


def test_what_is_left_of_the_budget_goes_to_the_best():
    scores = {"layers.0.a": torch.tensor([1.0]), "layers.0.b": torch.tensor([3.0]), "layers.1.a": torch.tensor([2.0])}
    scores["layers.1.b"] = torch.tensor([0.0])
    plan = select_modules(scores, dict.fromkeys(scores, 1), 5, 1)
    assert plan == {"layers.0.b": 3, "layers.1.a": 2}


@pytest.mark.parametrize(
    ("per_block", "budget", "message"),
    [
        (3, 8, "modules_per_layer is 3, but must be 1 to 2, .* layers.0: layers.0.a, layers.0.b"),
        (0, 8, "modules_per_layer is 0"),
        (2, 3, "a budget of 3 does not pay for one component of each of 4 modules, which cost 4"),
    ],
)
def test_what_cannot_be_planned_is_refused(per_block, budget, message):
    scores = {f"layers.{block}.{kind}": torch.ones(2) for block in range(2) for kind in "ab"}
    with pytest.raises(ValueError, match=message):
        select_modules(scores, dict.fromkeys(scores, 1), budget, per_block)


def test_a_score_that_is_not_finite_is_refused_with_its_layer():
    with pytest.raises(ValueError, match=r"layer layers\.0\.b has a non-finite score"):
        select_modules({"layers.0.a": torch.ones(1), "layers.0.b": torch.tensor([float("nan")])}, {}, 1, 1)
