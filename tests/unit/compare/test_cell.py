"""A worker that is told to stop."""

import os
import signal

import pytest
from support.comparison import write_comparison

from dora_dist import train
from dora_dist.compare.cell import run_cell
from dora_dist.compare.plan import Plan
from dora_dist.compare.settings import parse_compare
from dora_dist.console.errors import PreemptedError


@pytest.mark.parametrize("error", [None, OSError("disk full")], ids=["finished", "failed"])
def test_a_signal_behind_the_last_step_of_a_cell_ends_its_worker(tmp_path, monkeypatch, error):
    """The run itself has nothing left to stop there; without this, the worker would begin its next cell."""
    plan = Plan(parse_compare(["--config", str(write_comparison(tmp_path))]))
    cell = next(plan.possible_cells())

    def told_at_the_end(*arguments, **options):
        (plan.cell_folder(cell) / "checkpoint-12").mkdir()
        os.kill(os.getpid(), signal.SIGTERM)
        if error is not None:
            raise error

    monkeypatch.setattr(train, "train", told_at_the_end)
    with pytest.raises(PreemptedError, match="received SIGTERM when echo rank 2 lora"):
        run_cell(plan, cell, {}, {})
    assert (plan.cell_folder(cell) / "checkpoint-12").exists() == (error is not None)
    assert (plan.cell_folder(cell) / "failure.json").exists() == (error is not None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
