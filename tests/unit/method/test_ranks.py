"""Ranks that are fixed before the first step: whole numbers at the price of a uniform rank."""

import itertools
import random

import pytest

from dora_dist.method.ranks import apportion, in_mlps, in_strata, rising_with_depth

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
