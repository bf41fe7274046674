"""Evaluations on real ranks."""

import platform

import pytest
from support.evaluation_functions import evaluate_answers
from support.ranks import run_ranks

NODE = platform.node()
ADVICE = (
    "no memory left in an evaluation: lower training.per_device_eval_batch_size; where it is 1, "
    "evaluation.max_new_tokens in a new run (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB)"
)


@pytest.mark.parametrize(
    ("failing", "error_type", "error"),
    [
        ([1], "RankFailedError", f"evaluation failed on 1 of 2 ranks: rank 1 ({NODE}): NoMemoryLeftError: {ADVICE}"),
        ([0, 1], "NoMemoryLeftError", ADVICE),
    ],
)
def test_memory_that_runs_out_in_an_evaluation_ends_all_ranks_with_the_settings_to_lower(failing, error_type, error):
    outcomes = run_ranks(evaluate_answers, 2, 4, [], failing)
    assert [(outcome.error_type, outcome.error) for outcome in outcomes] == [(error_type, error)] * 2


@pytest.mark.parametrize("num_examples", [9, 3])
def test_generated_answers_give_the_same_figures_on_any_number_of_ranks(num_examples):
    """To the last bit; of three examples, some ranks have none."""
    alone, *others = (
        [outcome.value for outcome in run_ranks(evaluate_answers, ranks, num_examples, ["exact_match"], [])]
        for ranks in (1, 2, 4)
    )
    (expected,) = alone
    assert expected["figures"]["examples"] == num_examples
    assert [one.number for one in expected["shown"]["eval"]] == list(range(min(num_examples, 4)))
    for values in others:
        assert values == [expected] * len(values)
