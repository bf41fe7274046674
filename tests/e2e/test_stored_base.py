"""A run on a base that comes in 4 bits is the run that quantizes the base itself, bit for bit."""

import pytest
from support.commands import steps_of
from support.forked_run import run_forked, run_to_the_end
from support.same_run import assert_same_run
from support.tiny_run import write_config

from dora_dist.quantize import __main__ as quantize

ONE = {"ranks": 1, "engine": "none"}


@pytest.mark.full("ranks")
def test_losses_masks_and_adapter_are_the_same_and_commands_take_it(tmp_path):
    config = write_config(tmp_path, training={"save_steps": 12})
    quantize.main([str(tmp_path / "model"), str(tmp_path / "stored")])
    run_to_the_end(config, tmp_path / "run", tmp_path / "log", **ONE)
    stored = tmp_path / "stored-run"
    run_to_the_end(config, stored, tmp_path / "log2", "--model.path", str(tmp_path / "stored"), **ONE)
    assert_same_run(tmp_path / "run", stored)
    assert steps_of(stored)[-1]["components"] < steps_of(stored)[0]["components"], "the run prunes"
    assert f"{tmp_path / 'stored'}, quantization nf4" in (stored / "adapter" / "README.md").read_text()
    finished = run_forked("generate", str(stored), "--prompt", "w1 w2", "--max-new-tokens", "4")
    assert "--- adapter" in finished.output
    assert "--- base" in finished.output
