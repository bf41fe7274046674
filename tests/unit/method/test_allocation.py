from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.method.allocation import select_components, select_within_budget

# Few different values, so that ties are the rule.
TIED = st.sampled_from([0.0, 0.25, 0.5, 1.0])
LAYERS = st.lists(st.lists(TIED | st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=4)


def named(layers: list[list[float]]) -> dict[str, torch.Tensor]:
    return {f"layer.{number}": torch.tensor(scores, dtype=torch.float64) for number, scores in enumerate(layers)}


def chosen(masks: dict[str, torch.Tensor]) -> set[tuple[str, int]]:
    return {(name, index) for name, mask in masks.items() for index in mask.nonzero().flatten().tolist()}


def best_sum(scores: dict[str, torch.Tensor], num_keep: int, min_rank: int, max_rank: int) -> float | None:
    """Largest sum over all selections within the bounds, by trying them all; None where there is none."""
    components = [(name, index) for name, layer in scores.items() for index in range(len(layer))]
    sums = []
    for subset in combinations(components, num_keep):
        ranks = [sum(owner == name for owner, _ in subset) for name in scores]
        if all(min_rank <= rank <= max_rank for rank in ranks):
            sums.append(sum(scores[name][index].item() for name, index in subset))
    return max(sums, default=None)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.data())
def test_the_selection_is_the_best_that_the_bounds_admit(layers, data):
    scores = named(layers[:3])
    total = sum(map(len, scores.values()))
    num_keep = data.draw(st.integers(0, total))
    min_rank = data.draw(st.integers(0, 2))
    max_rank = data.draw(st.integers(min_rank, 4))
    best = best_sum(scores, num_keep, min_rank, max_rank)
    if best is None:
        with pytest.raises(ValueError, match="min_rank"):
            select_components(scores, num_keep, min_rank, max_rank)
        return
    masks = select_components(scores, num_keep, min_rank, max_rank)
    ranks = [int(mask.sum()) for mask in masks.values()]
    assert sum(ranks) == num_keep
    assert min_rank <= min(ranks)
    assert max(ranks) <= max_rank
    assert sum(float(scores[name][mask].sum()) for name, mask in masks.items()) == pytest.approx(best, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.data())
def test_the_selection_does_not_depend_on_the_order_of_the_layers(layers, data):
    scores = named(layers)
    num_keep = data.draw(st.integers(0, sum(map(len, scores.values()))))
    shuffled = dict(data.draw(st.permutations(list(scores.items()))))
    assert chosen(select_components(scores, num_keep)) == chosen(select_components(shuffled, num_keep))


@pytest.mark.parametrize("num_keep", [0, 1, 5, 11, 12])
def test_the_budget_is_met_exactly_when_all_scores_tie(num_keep):
    scores = {name: torch.zeros(4) for name in ("c", "a", "b")}
    ties = [(name, index) for name in ("a", "b", "c") for index in range(4)]
    assert chosen(select_components(scores, num_keep)) == set(ties[:num_keep])


def test_ties_go_by_layer_name_then_index_even_with_bounds():
    scores = {"b": torch.tensor([1.0, 1.0, 1.0]), "a": torch.tensor([0.0, 1.0, 1.0])}
    assert chosen(select_components(scores, 3)) == {("a", 1), ("a", 2), ("b", 0)}
    assert chosen(select_components(scores, 3, max_rank=2, min_rank=1)) == {("a", 1), ("b", 0), ("a", 2)}
    assert chosen(select_components(scores, 2, max_rank=1)) == {("a", 1), ("b", 0)}


def test_bounds_move_components_between_layers():
    scores = {"strong": torch.tensor([9.0, 8.0, 7.0, 6.0]), "weak": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert chosen(select_components(scores, 4)) == {("strong", index) for index in range(4)}
    three = {("strong", 0), ("strong", 1), ("strong", 2)}
    assert chosen(select_components(scores, 4, min_rank=1)) == three | {("weak", 3)}
    assert chosen(select_components(scores, 4, max_rank=2)) == {("strong", 0), ("strong", 1), ("weak", 3), ("weak", 2)}


def test_layers_of_different_size_and_dtype_compete_in_float64():
    scores = {
        "a": torch.tensor([0.5], dtype=torch.bfloat16),
        "b": torch.tensor([0.5 + 1e-12, 0.1], dtype=torch.float64),
    }
    assert chosen(select_components(scores, 1)) == {("b", 0)}


@pytest.mark.parametrize(
    ("num_keep", "bounds", "numbers"),
    [
        (9, {}, "cannot keep 9 of 8 .* admit 0 to 8"),
        (-1, {}, "cannot keep -1 of 8"),
        (3, {"min_rank": 2}, "cannot keep 3 .* min_rank 2 .* admit 4 to 8"),
        (5, {"max_rank": 2}, "cannot keep 5 .* max_rank 2 admit 0 to 4"),
        (4, {"min_rank": 5}, "min_rank is 5, but the smallest layer has 4"),
        (4, {"min_rank": 2, "max_rank": 1}, "min_rank 2 and max_rank 1"),
        (4, {"min_rank": -1}, "min_rank -1"),
    ],
)
def test_infeasible_budgets_are_refused_with_the_numbers(num_keep, bounds, numbers):
    with pytest.raises(ValueError, match=numbers):
        select_components({"a": torch.rand(4), "b": torch.rand(4)}, num_keep, **bounds)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="no layers"):
        select_components({}, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused_with_its_layer(value):
    with pytest.raises(ValueError, match="layer b has a non-finite score"):
        select_components({"a": torch.rand(2), "b": torch.tensor([0.5, value])}, 2)


def best_within(scores: dict[str, torch.Tensor], costs: dict[str, int], budget: int) -> float:
    """Largest sum of scores that a budget can pay, by trying all selections."""
    items = [(score.item(), costs[name]) for name, layer in scores.items() for score in layer]
    subsets = (subset for size in range(len(items) + 1) for subset in combinations(items, size))
    return max(sum(score for score, _ in s) for s in subsets if sum(cost for _, cost in s) <= budget)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.data())
def test_a_selection_by_cost_keeps_its_guarantee(layers, data):
    scores = named(layers[:3])
    costs = {name: data.draw(st.sampled_from([2, 3, 7])) for name in scores}
    total = sum(costs[name] * len(layer) for name, layer in scores.items())
    budget = data.draw(st.integers(0, total))
    masks = select_within_budget(scores, costs, budget)
    spent = sum(costs[name] * int(mask.sum()) for name, mask in masks.items())
    kept = sum(scores[name][mask].sum().item() for name, mask in masks.items())
    pruned = [(scores[name][~mask], costs[name]) for name, mask in masks.items() if not mask.all()]
    assert spent <= budget
    if pruned:
        assert budget - spent < min(cost for _, cost in pruned)
        missing = best_within(scores, costs, budget) - kept
        assert missing <= max(score.max().item() for score, _ in pruned) + 1e-12


def test_components_are_judged_by_their_score_per_cost_and_the_rest_of_the_budget_is_filled():
    scores = {"narrow": torch.tensor([0.5, 0.2]), "wide": torch.tensor([0.9, 0.8])}
    costs = {"narrow": 2, "wide": 5}
    assert chosen(select_within_budget(scores, costs, 7)) == {("narrow", 0), ("wide", 0)}
    # The second wide one does not fit any more; a narrow one that is worth less does.
    assert chosen(select_within_budget(scores, costs, 11)) == {("narrow", 0), ("wide", 0), ("narrow", 1)}


def test_what_is_not_eligible_is_not_kept_even_where_the_budget_would_pay_for_it():
    scores = {"a": torch.tensor([0.9, 0.5, 0.1]), "b": torch.tensor([0.8])}
    eligible = {"a": torch.tensor([False, True, True]), "b": torch.tensor([True])}
    masks = select_within_budget(scores, {"a": 1, "b": 2}, 5, eligible=eligible)
    assert chosen(masks) == {("a", 1), ("a", 2), ("b", 0)}
    assert chosen(select_within_budget(scores, {"a": 1, "b": 2}, 3, min_rank=1, eligible=eligible)) == {
        ("a", 1),
        ("b", 0),
    }


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"a": 3, "b": 5}, "cannot keep 33 of 32 parameters of components: .* admit 0 to 32"),
        ({"a": 0, "b": 5}, "a component of layer a costs 0"),
    ],
)
def test_costs_and_budgets_that_make_no_sense_are_refused(costs, message):
    with pytest.raises(ValueError, match=message):
        select_within_budget({"a": torch.rand(4), "b": torch.rand(4)}, costs, 33)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=3), min_size=1, max_size=3), st.data())
def test_scores_below_0_displace_none_above_and_fill_the_rest_with_the_least_harm(layers, data):
    scores = named(layers)
    costs = {name: data.draw(st.integers(1, 5)) for name in scores}
    budget = data.draw(st.integers(0, sum(costs[name] * len(layer) for name, layer in scores.items())))
    kept = chosen(select_within_budget(scores, costs, budget))
    components = [(name, index) for name, layer in scores.items() for index in range(len(layer))]
    value = {one: max(float(scores[one[0]][one[1]]), 0.0) for one in components}
    best, cost = 0.0, {one: costs[one[0]] for one in components}
    for number in range(len(components) + 1):
        for subset in combinations(components, number):
            if sum(map(cost.__getitem__, subset)) <= budget:
                best = max(best, sum(map(value.__getitem__, subset)))
    left_out = [one for one in components if one not in kept]
    slack = max((value[one] for one in left_out), default=0.0)
    assert sum(map(value.__getitem__, kept)) >= best - slack - 1e-12
    harm = {one: float(scores[one[0]][one[1]]) / cost[one] for one in components}
    left = budget - sum(map(cost.__getitem__, kept))
    for one in left_out:
        for other in kept:
            # Whatever is worse for its cost is there only because the better one did not fit when its turn came.
            if harm[one] > harm[other]:
                assert cost[one] > left + sum(cost[third] for third in kept if harm[third] <= harm[other])
