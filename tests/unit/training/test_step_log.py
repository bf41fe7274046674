"""The method's figures in a line of the log."""

import pytest
import torch
from support.tiny_controller import make_controller

from dora_dist.distributed.agreement import Agreement
from dora_dist.training.skipped_steps import SkipPolicy
from dora_dist.training.step_log import StepLog


def test_the_terms_of_a_step_that_was_skipped_are_in_no_line():
    policy = SkipPolicy(Agreement(), most=1)
    log = StepLog(make_controller(), policy, {"penalty": 0.5}, torch.device("cpu"), lambda first, last: last - first)
    log.start_clock(0)
    for step, term in enumerate((1.0, float("nan"), 3.0), 1):
        log.begin_step()
        for share in (0.25 * term, 0.75 * term):  # of two micro-batches
            assert float(log.add("penalty", torch.tensor(share))) == pytest.approx(share / 2, nan_ok=True)
        if policy.after_step(step, skipped=step == 2):
            log.forget_step()
    line = {"loss": 4.0}
    log.complete(line, 3)
    assert line["penalty"] == 2.0
    assert line["loss"] == 4.0 * 3 / 2 - 0.5 * 2.0  # the Trainer's mean is over all steps
    assert "grad_norm" not in line
    log.begin_step()
    log.add("penalty", torch.tensor(5.0))
    log.complete(line, 4)
    assert line["penalty"] == 5.0
