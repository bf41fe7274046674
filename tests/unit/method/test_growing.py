"""Growth against its rules, and the smoothed score against the recursion written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.method.growing import ModuleScores, grow_components, sensitivity_of_layers


def masks(ranks: dict[str, int], slots: int) -> dict[str, torch.Tensor]:
    return {name: torch.arange(slots) < rank for name, rank in ranks.items()}


def counts(found) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in found.items()}


def test_the_best_layers_get_one_component_each():
    alive = masks({"a": 1, "b": 1, "c": 1}, 4)
    grown = grow_components({"a": 0.1, "b": 0.5, "c": 0.3}, alive, dict.fromkeys(alive, 1), 5)
    assert counts(grown) == {"a": 0, "b": 1, "c": 1}
    assert grown["b"].tolist() == [False, True, False, False]


def test_score_per_cost_decides_and_ties_go_by_name():
    alive = masks({"narrow": 1, "wide": 1, "also": 1}, 2)
    costs = {"narrow": 2, "wide": 5, "also": 2}
    assert counts(grow_components({"narrow": 2.0, "wide": 4.0, "also": 2.0}, alive, costs, 9 + 2)) == {
        "also": 1,
        "narrow": 0,
        "wide": 0,
    }


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_growth_spends_the_budget_as_far_as_there_are_slots(data):
    names = ["a", "b", "c"][: data.draw(st.integers(1, 3))]
    slots = data.draw(st.integers(1, 4))
    alive = {n: torch.tensor(data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots))) for n in names}
    costs = {name: data.draw(st.sampled_from([1, 2, 5])) for name in names}
    scores = {name: data.draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)) for name in names}
    before = sum(costs[name] * int(alive[name].sum()) for name in names)
    budget = before + data.draw(st.integers(0, 20))
    grown = grow_components(scores, alive, costs, budget)
    left = budget - before - sum(costs[name] * rank for name, rank in counts(grown).items())
    assert left >= 0
    for name in names:
        assert not (grown[name] & alive[name]).any()
        assert left < costs[name] or (grown[name] | alive[name]).all()
    # Evenly: who has two more than another had no slot, or did not fit.
    for one in names:
        for other in names:
            if counts(grown)[one] > counts(grown)[other] + 1:
                assert (grown[other] | alive[other]).all() or costs[other] > costs[one]
    assert counts(grow_components(dict(reversed(scores.items())), alive, costs, budget)) == counts(grown)


def test_smoothed_scores_are_the_recursion_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    found, beta = ModuleScores.start(3), 0.85
    sensitivity = uncertainty = torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        now = torch.rand(3, generator=generator, dtype=torch.float64)
        found = found.after(now)
        sensitivity = beta * sensitivity + (1 - beta) * now
        uncertainty = beta * uncertainty + (1 - beta) * (sensitivity - now).abs()
    torch.testing.assert_close(found.scores, sensitivity * uncertainty, rtol=1e-14, atol=0)
    assert found.scores.dtype == torch.float64


def test_the_sensitivity_of_a_layer_is_the_sum_of_its_components_changes():
    changes = torch.tensor([1.0, -2.0, 0.5, -0.5, 4.0])
    assert sensitivity_of_layers(changes, [2, 2, 1]).tolist() == [3.0, 1.0, 4.0]


def test_bad_scores_and_too_small_budgets_are_refused():
    alive = masks({"a": 2}, 3)
    with pytest.raises(ValueError, match="layer a has a non-finite score: nan"):
        grow_components({"a": float("nan")}, alive, {"a": 1}, 3)
    with pytest.raises(ValueError, match="cost 6, more than the budget 5"):
        grow_components({"a": 1.0}, alive, {"a": 3}, 5)
