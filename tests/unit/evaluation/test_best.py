import json
import math

import pytest

from dora_dist.evaluation.best import BestCheckpoint, BestRule, figures_of


def follow(figure: str, values: dict[int, float], patience: int | None = None, steps: range = range(5, 21)):
    """A search that has seen these values of a figure, by step."""
    best = BestCheckpoint(BestRule(figure=figure, patience=patience, steps=frozenset(steps)))
    for step, value in values.items():
        best.after_evaluation(step, {figure: value, "examples": 4})
    return best


@pytest.mark.parametrize(("figure", "step"), [("loss", 7), ("finnish_loss", 7), ("exact_match", 6), ("fi_f1", 6)])
def test_less_of_a_loss_and_more_of_everything_else_is_better(figure, step):
    assert follow(figure, {5: 0.3, 6: 0.4, 7: 0.2}).step == step


def test_evaluations_before_the_final_event_and_between_saves_do_not_count():
    best = follow("loss", {4: 0.1, 5: 0.3, 6: 0.2, 7: 0.4}, patience=1, steps=range(5, 21, 2))
    assert (best.step, best.value, best.waited) == (5, 0.3, 1)
    assert best.has_waited_long_enough


def test_the_first_of_equal_ones_is_the_best_and_an_evaluation_seen_again_changes_nothing():
    best = follow("loss", {5: 0.3, 6: 0.3})
    best.after_evaluation(6, {"loss": 0.1})
    assert (best.step, best.waited) == (5, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_is_never_the_best(bad):
    assert follow("loss", {5: bad}).step is None
    assert follow("loss", {5: bad, 6: 9.0, 7: bad}, patience=1).step == 6


def test_patience_counts_evaluations_in_a_row():
    values = {5: 0.3, 6: 0.4, 7: 0.2, 8: 0.3, 9: 0.3}
    assert follow("loss", values, patience=2).has_waited_long_enough
    assert not follow("loss", dict(list(values.items())[:-1]), patience=2).has_waited_long_enough
    assert not follow("loss", values).has_waited_long_enough


def test_a_state_goes_through_a_checkpoint_and_is_that_of_one_figure():
    best = follow("loss", {5: 0.1 + 0.2, 6: 0.4}, patience=3)
    state = json.loads(json.dumps(best.state()))
    again, other = follow("loss", {}, patience=3), follow("f1", {})
    for found in (again, other):
        found.load_state(state)
        found.load_state(None)
    assert again.state() == best.state()
    assert other.step is None


def test_sources_have_figures_of_their_own_where_there_are_several():
    assert figures_of(["f1"], ["en"]) == ["loss", "f1"]
    assert figures_of(["f1"], ["en", "fi"]) == ["loss", "f1", "en_loss", "en_f1", "fi_loss", "fi_f1"]
