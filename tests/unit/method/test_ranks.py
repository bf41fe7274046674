"""Ranks that are fixed before the first step: whole numbers at the price of a uniform rank."""

import itertools
import random

import pytest
import torch

from dora_dist.method.ranks import (
    apportion,
    by_spectrum,
    by_weight_gradient,
    groups_within,
    in_mlps,
    in_strata,
    rising_with_depth,
)

COSTS = {"a": 3, "b": 5, "c": 8}
MOST = {"a": 4, "b": 4, "c": 4}


def test_equal_weights_give_the_uniform_rank():
    assert apportion(dict.fromkeys(COSTS, 0.3), COSTS, 2 * 16, MOST) == dict.fromkeys(COSTS, 2)


def test_what_is_left_buys_no_component():
    source = random.Random(0)
    for _ in range(50):
        weights = {name: source.random() for name in COSTS}
        budget = source.randint(3, 60)
        ranks = apportion(weights, COSTS, budget, MOST)
        left = budget - sum(COSTS[name] * rank for name, rank in ranks.items())
        assert 0 <= left < min((COSTS[name] for name in COSTS if ranks[name] < MOST[name]), default=999)


def test_ranks_are_in_proportion_where_whole_numbers_can_be():
    assert apportion({"a": 1.0, "b": 2.0, "c": 3.0}, COSTS, 3 + 10 + 24, MOST) == {"a": 1, "b": 2, "c": 3}


def test_no_other_ranks_of_the_same_number_are_nearer_to_the_weights():
    """What the method of odd numbers is known for: the smallest sum of squared errors per unit of weight."""
    weights, most = {"a": 0.7, "b": 1.9, "c": 2.8}, dict.fromkeys(COSTS, 9)
    ranks = apportion(weights, dict.fromkeys(COSTS, 1), 9, most)

    def error(numbers: tuple[int, ...]) -> float:
        total = sum(weights.values())
        shares = [9 * weight / total for weight in weights.values()]
        found = zip(numbers, shares, weights.values(), strict=True)
        return sum((number - share) ** 2 / weight for number, share, weight in found)

    every = [numbers for numbers in itertools.product(range(10), repeat=3) if sum(numbers) == 9]
    assert tuple(ranks.values()) == min(every, key=error)


def test_a_full_layer_leaves_its_share_to_the_others():
    assert apportion({"a": 1e9, "b": 1.0, "c": 1e-9}, dict.fromkeys(COSTS, 1), 9, MOST) == {"a": 4, "b": 4, "c": 1}


def test_a_layer_without_weight_has_nothing():
    assert apportion({"a": 0.0, "b": 1.0, "c": 0.0}, COSTS, 16, MOST) == {"a": 0, "b": 3, "c": 0}


def test_more_than_the_layers_can_hold_is_refused():
    with pytest.raises(ValueError, match="64"):
        apportion(dict.fromkeys(COSTS, 1.0), COSTS, 1000, MOST)
    with pytest.raises(ValueError, match="no layer has a weight"):
        apportion(dict.fromkeys(COSTS, 0.0), COSTS, 16, MOST)


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"),
        ("encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"),
        ("decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.2.DenseReluDense.wi"),
    ],
)
def test_mlps_are_known_by_their_names(attention, mlp):
    assert in_mlps([attention, mlp]) == {attention: 0.0, mlp: 1.0}


def test_a_model_of_one_kind_has_no_mlps_of_its_own():
    with pytest.raises(ValueError, match=r"in attentions by their names, such as x\.attn\.q"):
        in_mlps(["x.attn.q"])
    with pytest.raises(ValueError, match="outside of attentions"):
        in_mlps(["x.up"])


def test_weights_rise_from_a_half_to_one_and_a_half_in_each_stack():
    names = [f"{stack}.block.{number}.q" for stack in ("encoder", "decoder") for number in (0, 2, 4)]
    assert list(rising_with_depth(names).values()) == [0.5, 1.0, 1.5] * 2
    assert rising_with_depth(["h.0.q"]) == {"h.0.q": 1.0}


@pytest.mark.parametrize(
    ("blocks", "weights"),
    [(1, [1]), (2, [0.5, 1]), (3, [0, 0.5, 1]), (4, [0, 0.5, 1, 1]), (6, [0, 0, 0.5, 0.5, 1, 1])],
)
def test_strata_are_thirds_of_the_blocks_of_each_stack(blocks, weights):
    names = [f"{stack}.block.{number}.q" for stack in ("encoder", "decoder") for number in range(blocks)]
    assert list(in_strata(names).values()) == weights * 2


@pytest.mark.parametrize("generator", [rising_with_depth, in_strata])
def test_a_layer_outside_of_blocks_has_no_depth(generator):
    with pytest.raises(ValueError, match=r"pooler\.dense is in no numbered block"):
        generator(["h.0.q", "pooler.dense"])


def test_every_layer_has_the_least_whatever_its_weight():
    assert apportion({"a": 0.0, "b": 1.0, "c": 0.0}, COSTS, 32, MOST, least=1) == {"a": 1, "b": 4, "c": 1}


def test_ranks_by_spectrum_keep_the_largest_sum_of_squares_for_their_cost():
    """Against all ranks that cost as much: 0 to 4 of each layer."""
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        spectra = {name: torch.rand(4, generator=source).sort(descending=True).values for name in COSTS}
        found = by_spectrum(spectra, COSTS, 25)
        cost = sum(COSTS[name] * rank for name, rank in found.items())
        assert 0 <= 25 - cost < max(COSTS.values())

        def worth(ranks, spectra=spectra):
            return sum(float(spectra[name][:rank].square().sum()) for name, rank in ranks.items())

        every = (dict(zip(COSTS, numbers, strict=True)) for numbers in itertools.product(range(5), repeat=3))
        same = [ranks for ranks in every if sum(COSTS[name] * rank for name, rank in ranks.items()) <= cost]
        # The order of worth per cost is within one component of the best choice.
        assert worth(found) >= max(map(worth, same)) - max(float(values[0].square()) for values in spectra.values())


def test_ranks_of_gora_are_its_formula_where_its_total_is_the_budget():
    """``r_m = round(B p_m / sqrt(in + out))`` with ``B = sum r sqrt(in + out)``, chosen so that no rounding is left."""
    costs = {"a": 16, "b": 64, "c": 144}
    importance = {"a": 3 * 4.0, "b": 6 * 8.0, "c": 5 * 12.0}
    scale = sum(importance.values())
    total = 5 * sum(cost**0.5 for cost in costs.values())
    formula = {name: total * value / scale / costs[name] ** 0.5 for name, value in importance.items()}
    assert formula == pytest.approx({"a": 3, "b": 6, "c": 5})
    budget = 3 * 16 + 6 * 64 + 5 * 144
    assert by_weight_gradient(importance, costs, budget, dict.fromkeys(costs, 20), 5) == {"a": 3, "b": 6, "c": 5}


def test_ranks_of_gora_lie_between_a_half_and_four_times_the_uniform_rank_and_within_the_slots():
    costs = dict.fromkeys("abcdefgh", 2)
    importance = {"a": 1e6, **dict.fromkeys("bcdefgh", 1.0)}
    roomy = by_weight_gradient(importance, costs, 2 * 8 * 4, dict.fromkeys(costs, 99), 4)
    assert roomy["a"] == 16
    assert sum(roomy.values()) == 32
    assert min(roomy.values()) == 2
    assert by_weight_gradient(importance, costs, 2 * 8 * 4, dict.fromkeys(costs, 8), 4)["a"] == 8


def test_groups_are_as_large_as_they_may_be_and_have_one_at_least():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 5, "f": 1}
    assert groups_within(sizes, 6) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert groups_within(sizes, 99) == [list(sizes)]
