"""``evaluation.keep_best``: what is refused before a model is read, and which evaluations count."""

import pytest
from support.resolved_run import load, resolved

BEST = ("--evaluation.keep_best", "loss")
EVALUATED = ("--training.eval_strategy", "steps", "--training.eval_steps", "2")


def test_what_counts_is_evaluated_and_saved_from_the_final_event_on_and_the_last_step(config):
    settings = load(config, *BEST, *EVALUATED, "--training.save_steps", "4", "--evaluation.early_stopping", "2")
    rule = resolved(settings).best
    assert (rule.figure, rule.patience, sorted(rule.steps)) == ("loss", 2, [8, 12])
    unpruned = load(config, *BEST, *EVALUATED, "--preset", "lora", "--adapter.initial_rank", "2")
    assert sorted(resolved(unpruned).best.steps) == [2, 4, 6, 8, 10, 12]
    assert resolved(load(config)).best is None


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ((), "eval_strategy is no"),
        ((*EVALUATED, "--training.save_strategy", "no"), "save_strategy no"),
        (
            ("--training.eval_strategy", "steps", "--training.eval_steps", "5", "--training.save_steps", "7"),
            "save_steps 7",
        ),
        ((*EVALUATED, "--training.save_steps", "12"), "save_steps 12"),
        ((*EVALUATED, "--training.eval_delay", "12"), "eval_steps 2"),
    ],
    ids=["no evaluation", "no save", "never both", "only at the end", "too late"],
)
def test_a_run_without_a_checkpoint_to_choose_is_refused(config, overrides, found):
    message = rf"keep_best is loss, but no step is both evaluated and saved from step 6 on .*{found}.* below 6$"
    with pytest.raises(ValueError, match=message):
        resolved(load(config, *BEST, *overrides))


@pytest.mark.parametrize("figure", ["los", "exact_match", "eval_loss"])
def test_an_unknown_figure_is_refused_with_those_that_there_are(config, figure):
    with pytest.raises(ValueError, match=rf"keep_best is '{figure}', but the evaluations of this run give loss"):
        resolved(load(config, "--evaluation.keep_best", figure, *EVALUATED))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*BEST, "--data.eval", "null"), "keep_best is loss, but there is no held-out data: set data.eval"),
        (("--evaluation.early_stopping", "2"), "early_stopping is 2, but evaluation.keep_best is null"),
        ((*BEST, "--evaluation.early_stopping", "0"), "early_stopping is 0, but must be at least 1"),
        (("--training.load_best_model_at_end", "true"), "set evaluation.keep_best"),
        (("--training.metric_for_best_model", "loss"), "set evaluation.keep_best"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_when_they_are_read(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(config, *overrides)


def test_the_trainers_own_way_of_saving_the_best_is_refused(config):
    with pytest.raises(ValueError, match=r"save_strategy is best, .* evaluation.keep_best"):
        resolved(load(config, "--training.save_strategy", "best", *EVALUATED))
