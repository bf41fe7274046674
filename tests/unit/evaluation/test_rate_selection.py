"""The learning rate that is chosen."""

import math

from dora_dist.evaluation.seeds import choose


def test_the_best_mean_wins_whatever_single_seeds_say():
    figures = {0.1: [1.0, 3.0], 0.2: [1.9, 1.9], 0.3: [0.5, 4.0]}
    found = choose(figures, lower_is_better=True)
    assert found.learning_rate == 0.2
    assert found.means == {0.1: 2.0, 0.2: 1.9, 0.3: 2.25}
    assert found.at_edge is None
    assert choose(figures, lower_is_better=False).learning_rate == 0.3


def test_an_edge_of_the_grid_is_named():
    falling = {0.2: [2.0], 0.1: [3.0], 0.4: [1.0]}
    assert choose(falling, lower_is_better=True).at_edge == "highest"
    assert choose(falling, lower_is_better=False).at_edge == "lowest"


def test_one_rate_is_no_search_and_has_no_edge():
    found = choose({0.1: [1.0]}, lower_is_better=True)
    assert (found.learning_rate, found.searched, found.at_edge) == (0.1, False, None)


def test_the_lowest_of_equal_rates():
    for sense in (True, False):
        assert choose({0.3: [1.0], 0.1: [1.0], 0.2: [1.0]}, sense).learning_rate == 0.1


def test_a_rate_at_which_one_seed_diverged_is_out():
    found = choose({0.1: [5.0, 5.0], 0.2: [1.0, math.nan]}, lower_is_better=True)
    assert found.learning_rate == 0.1
    assert math.isnan(found.means[0.2])
    assert choose({0.1: [1.0], 0.2: [math.inf]}, lower_is_better=False).learning_rate == 0.1


def test_nothing_is_chosen_where_all_diverged():
    assert choose({0.1: [math.nan], 0.2: [math.nan]}, lower_is_better=True) is None
