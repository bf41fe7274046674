"""Gradients of the micro-batches of a step, under ZeRO-2 in bfloat16."""

import deepspeed
import pytest
import torch
from packaging.version import Version
from support import rank_functions
from support.ranks import run_ranks


@pytest.mark.skipif(
    Version(deepspeed.__version__) < Version("0.19.8"), reason="DeepSpeed before 0.19.8 sums in bfloat16"
)
def test_the_launch_file_has_micro_batches_added_up_in_float32():
    (outcome,) = run_ranks(rank_functions.accumulate_under_zero2, 1, 8)
    assert outcome.error is None, outcome.error
    found, expected = outcome.value["found"], outcome.value["expected"]
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 1e-6 * expected.norm(), "in bfloat16, it is 4e-3"
