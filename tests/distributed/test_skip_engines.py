"""A step with a loss or gradient that is not finite on one rank is left out on all ranks, under every engine."""

import pytest
import torch
from support import rank_functions
from support.ranks import run_ranks
from support.tiny_run import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("bad", ["loss", "gradient", None])
@pytest.mark.parametrize("engine", ["none", "ddp", "zero2", "zero2 in bfloat16"])
def test_all_ranks_leave_the_step_out_and_go_on(engine, bad, model):
    outcomes = run_ranks(rank_functions.skip_under_engine, 1 if engine == "none" else 2, engine, model, bad)
    assert all(outcome.error is None for outcome in outcomes), [outcome.error for outcome in outcomes]
    for outcome in outcomes:
        skipped, changed = zip(*outcome.value["seen"], strict=True)
        assert skipped == (False, False, bad is not None, False)
        assert changed == (True, True, bad is None, True)
        assert torch.isfinite(outcome.value["weights"]).all()
        assert torch.equal(outcome.value["weights"], outcomes[0].value["weights"])
