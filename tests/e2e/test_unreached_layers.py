"""A run that adapts layers which the loss does not depend on."""

import pytest
from support.architectures import save_model
from support.forked_run import log_of, start_run
from support.ranks import wait_for_ranks
from support.tiny_run import write_config


@pytest.mark.parametrize("engine", ["zero2", pytest.param("ddp", marks=pytest.mark.full("ranks"))])
def test_all_ranks_end_alike_after_the_first_step_and_name_a_layer(tmp_path, engine):
    config = write_config(tmp_path, adapter={"target_modules": ["fc1", "up_proj"]})
    save_model("gemma3 with a tower", tmp_path / "model")
    processes = start_run(config, tmp_path / "run", tmp_path / "log", "--distributed.engine", engine, more=(engine,))
    wait_for_ranks(processes, timeout=120)
    output = log_of(tmp_path / "log", 2)
    assert [process.exitcode for process in processes] == [2, 2], output
    assert output.count("error: no gradient has come to 3 of 5 adapted layers in the first step (") == 1
    assert "(model.vision_tower.encoder.layers.0.mlp.fc1, " in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("checkpoint-*"))
