"""Evaluations on real ranks."""

import platform

import pytest
from support.evaluation_functions import evaluate_answers
from support.ranks import run_ranks

NODE = platform.node()
ADVICE = (
    "no memory left in an evaluation: lower training.per_device_eval_batch_size, or evaluation.max_new_tokens "
    "(OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB)"
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
