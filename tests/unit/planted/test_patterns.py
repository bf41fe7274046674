"""Planted ranks."""

import pytest

from dora_dist.planted.patterns import PATTERNS, planted_ranks

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(5) for kind in KINDS]


@pytest.mark.parametrize("target", [1, 2, 5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_truth_costs_exactly_the_budget(pattern, target):
    for names in (NAMES, NAMES[:14]):
        ranks = planted_ranks(pattern, names, target, seed=3)
        assert sorted(ranks) == sorted(names)
        assert sum(ranks.values()) == target * len(names)
        assert min(ranks.values()) >= 0


def test_what_the_patterns_promise():
    half = list(planted_ranks("half", NAMES, 3, seed=0).values())
    assert (half.count(0), half.count(6), half.count(3)) == (17, 17, 1)
    varied = set(planted_ranks("varied", NAMES, 3, seed=0).values())
    assert {0, 6} < varied <= set(range(7))
    one = planted_ranks("one-kind", NAMES, 3, seed=0, kind="v_proj")
    assert {name for name, rank in one.items() if rank} == {name for name in NAMES if name.endswith(".v_proj")}
    assert set(planted_ranks("uniform", NAMES, 3, seed=0).values()) == {3}


def test_ranks_depend_on_the_seed_and_not_on_the_order_of_the_names():
    first = planted_ranks("varied", NAMES, 3, seed=1)
    assert planted_ranks("varied", NAMES[::-1], 3, seed=1) == first
    assert planted_ranks("varied", NAMES, 3, seed=2) != first


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"--kind is 'c_attn', but must be .*down_proj"):
        planted_ranks("one-kind", NAMES, 3, seed=0, kind="c_attn")
    with pytest.raises(ValueError, match="--patterns has 'none'"):
        planted_ranks("none", NAMES, 3, seed=0)
