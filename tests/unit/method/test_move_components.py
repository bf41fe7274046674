"""Moves against their rules, by trying all numbers of components, and against the numbers of the paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.method.moving import MovedComponents, first_free, move_components

TIED = st.sampled_from([-0.5, 0.0, 0.25, 1.0])


def full(ranks: dict[str, int], slots: int) -> dict[str, torch.Tensor]:
    return {name: torch.arange(slots) < rank for name, rank in ranks.items()}


def counts(masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def after(alive, move: MovedComponents) -> dict[str, torch.Tensor]:
    return {name: (alive[name] & ~move.pruned[name]) | move.grown[name] for name in alive}


def spent(masks, costs) -> int:
    return sum(costs[name] * rank for name, rank in counts(masks).items())


def test_eight_components_for_three_layers_are_three_three_and_two_in_the_order_of_their_means():
    alive = full({"lost": 8, "low": 2, "high": 2, "middle": 2}, 16)
    scores = {"lost": torch.zeros(16), "low": torch.full((16,), 1.0), "high": torch.full((16,), 3.0)}
    scores["middle"] = torch.full((16,), 2.0)
    move = move_components(scores, alive, dict.fromkeys(alive, 1), 14, 8)
    assert counts(move.pruned) == {"lost": 8, "low": 0, "high": 0, "middle": 0}
    assert counts(move.grown) == {"lost": 0, "low": 2, "high": 3, "middle": 3}


def test_the_lowest_go_and_new_ones_take_the_first_free_slots():
    alive = {"a": torch.tensor([True, True, False, True]), "b": torch.tensor([True, False, True, False])}
    scores = {"a": torch.tensor([3.0, -1.0, -9.0, 0.5]), "b": torch.tensor([2.0, -9.0, 4.0, -9.0])}
    move = move_components(scores, alive, {"a": 1, "b": 1}, 5, 2)
    assert move.pruned["a"].tolist() == [False, True, False, True]
    assert move.grown["b"].tolist() == [False, True, False, True]
    assert not move.pruned["b"].any()
    assert not move.grown["a"].any()


def test_ties_go_by_name_then_index():
    alive = full({"b": 2, "a": 2, "c": 1}, 3)
    scores = dict.fromkeys(alive, torch.zeros(3))
    move = move_components(scores, alive, dict.fromkeys(alive, 1), 5, 1)
    assert move.pruned["a"].tolist() == [True, False, False]
    assert counts(move.grown) == {"a": 0, "b": 1, "c": 0}


def test_a_layer_without_components_comes_last():
    alive = full({"gone": 0, "lost": 2, "low": 1}, 4)
    scores = {"gone": torch.full((4,), 9.0), "lost": torch.full((4,), -8.0), "low": torch.full((4,), -7.0)}
    for num_moved, gone in ((1, 0), (2, 1)):
        move = move_components(scores, alive, dict.fromkeys(alive, 1), 3, num_moved)
        assert counts(move.grown) == {"gone": gone, "lost": 0, "low": 1}


@pytest.mark.parametrize(("slots", "moved"), [(2, 0), (3, 2), (4, 2), (5, 3)])
def test_no_more_is_moved_than_free_slots_can_take(slots, moved):
    alive = full({"low": 2, "lower": 2, "high": 2}, slots)
    scores = {"low": torch.tensor([1.0, 9.0]), "lower": torch.tensor([0.0, 0.5]), "high": torch.tensor([8.0, 8.0])}
    scores = {name: torch.cat([values, torch.zeros(slots - 2)]) for name, values in scores.items()}
    move = move_components(scores, alive, dict.fromkeys(alive, 1), 6, 3)
    # Three take one from "low", which leaves "high" alone to take them; two are both of "lower".
    assert sum(counts(move.pruned).values()) == sum(counts(move.grown).values()) == moved


def test_nothing_is_moved_where_every_layer_loses_one_unless_fewer_do():
    alive = full({"a": 1, "b": 1}, 2)
    scores = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([1.0, 0.0])}
    move = move_components(scores, alive, {"a": 1, "b": 1}, 2, 2)
    assert counts(move.pruned) == {"a": 1, "b": 0}
    assert counts(move.grown) == {"a": 0, "b": 1}


def test_a_layer_keeps_its_minimum():
    alive = full({"a": 3, "b": 1}, 4)
    scores = {"a": torch.tensor([0.0, 0.1, 0.2, 0.0]), "b": torch.ones(4)}
    move = move_components(scores, alive, {"a": 1, "b": 1}, 4, 3, min_rank=2)
    assert move.pruned["a"].tolist() == [True, False, False, False]


@st.composite
def situations(draw):
    slots = draw(st.integers(1, 4))
    names = [f"layer.{number}" for number in range(draw(st.integers(1, 4)))]
    costs = {name: draw(st.sampled_from([1, 2, 3, 7])) for name in names}
    alive = {name: torch.tensor(draw(st.lists(st.booleans(), min_size=slots, max_size=slots))) for name in names}
    values = st.lists(TIED | st.floats(-1, 1), min_size=slots, max_size=slots)
    scores = {name: torch.tensor(draw(values), dtype=torch.float64) for name in names}
    left = draw(st.integers(0, max(costs.values()) - 1))
    return scores, alive, costs, spent(alive, costs) + left


def oracle(scores, alive, costs, budget, num_moved):
    """The paper's event, component by component, with the most moves for which the budget is met; ranks afterwards."""
    pool = sorted((float(scores[n][i]), n, i) for n in alive for i in range(len(alive[n])) if alive[n][i])
    for count in range(min(num_moved, len(pool)), -1, -1):
        ranks = counts(alive)
        for _, name, _ in pool[:count]:
            ranks[name] -= 1
        lost = {name for _, name, _ in pool[:count]}
        means = {n: float(scores[n][alive[n]].mean()) if alive[n].any() else -float("inf") for n in alive}
        turns = sorted(alive.keys() - lost, key=lambda n: (-means[n], n)) if count else []
        left, placed = budget - sum(costs[n] * r for n, r in ranks.items()), True
        while placed:
            placed = False
            for name in turns:
                if ranks[name] < len(alive[name]) and costs[name] <= left:
                    ranks[name], left, placed = ranks[name] + 1, left - costs[name], True
        if left < max(costs.values()):
            return ranks
    raise AssertionError


@settings(max_examples=300, deadline=None)
@given(situations(), st.integers(0, 5))
def test_a_move_is_the_papers_at_a_budget_that_never_grows(situation, num_moved):
    scores, alive, costs, budget = situation
    move = move_components(scores, alive, costs, budget, num_moved)
    for name in alive:
        assert not (move.pruned[name] & ~alive[name]).any()
        assert not (move.grown[name] & alive[name]).any()
        assert not (move.pruned[name].any() and move.grown[name].any())
    result = after(alive, move)
    assert 0 <= budget - spent(result, costs) < max(costs.values())
    assert counts(result) == oracle(scores, alive, costs, budget, num_moved)
    gone = [float(scores[n][i]) for n in alive for i in range(len(alive[n])) if move.pruned[n][i]]
    stay = [float(scores[n][i]) for n in alive for i in range(len(alive[n])) if alive[n][i] and not move.pruned[n][i]]
    assert not gone or not stay or max(gone) <= min(stay)
    shuffled = {name: scores[name] for name in reversed(scores)}
    again = move_components(shuffled, alive, costs, budget, num_moved)
    assert all(
        torch.equal(again.grown[n], move.grown[n]) and torch.equal(again.pruned[n], move.pruned[n]) for n in alive
    )


def test_llama_2_has_the_papers_parameters_before_and_after_eight_events():
    """Table 1: 20.0M at the start, 19.6M where all that is moved goes from the MLP to the attention."""
    shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    widths = {f"layers.{block}.{name}": sum(shape) for block in range(32) for name, shape in shapes.items()}
    scores = {name: torch.full((16,), 1.0 if sum(shapes[name.split(".")[-1]]) == 8192 else 0.0) for name in widths}
    alive = full(dict.fromkeys(widths, 8), 16)
    assert spent(alive, widths) == 19_988_480
    for _ in range(8):
        move = move_components(scores, alive, dict.fromkeys(widths, 1), 8 * 224, 7)
        assert sum(counts(move.pruned).values()) == 7
        alive = after(alive, move)
    assert sum(counts(alive).values()) == 8 * 224
    assert spent(alive, widths) == 19_601_408
    # In parameters, what goes to narrow layers is more components, and the total stays.
    alive = full(dict.fromkeys(widths, 8), 16)
    for _ in range(8):
        alive = after(alive, move_components(scores, alive, widths, 19_988_480, 7))
    assert 0 <= 19_988_480 - spent(alive, widths) < 15_104
    assert sum(counts(alive).values()) > 8 * 224


def test_scores_that_are_not_finite_and_a_budget_that_is_not_the_components_are_refused():
    alive = full({"a": 2, "b": 1}, 3)
    scores = {"a": torch.tensor([1.0, float("nan"), 0.0]), "b": torch.ones(3)}
    with pytest.raises(ValueError, match="layer a has a non-finite score"):
        move_components(scores, alive, {"a": 1, "b": 1}, 3, 1)
    scores["a"] = torch.tensor([1.0, 2.0, float("nan")])  # of a slot that is free
    move_components(scores, alive, {"a": 1, "b": 1}, 3, 1)
    for budget in (2, 4):
        with pytest.raises(ValueError, match=f"cost 3, but must cost at most the budget {budget}"):
            move_components(scores, alive, {"a": 1, "b": 1}, budget, 1)


def test_the_first_free_slots():
    alive = torch.tensor([True, False, True, False, False])
    assert first_free(alive, 2).tolist() == [False, True, False, True, False]
    assert not first_free(alive, 0).any()
    assert first_free(alive, 9).tolist() == (~alive).tolist()
