"""A run on a model with fused experts, which are neither quantized nor adapted."""

import json

from support.architectures import save_model
from support.forked_run import run_forked, run_to_the_end
from support.tiny_run import write_config

LEFT_OUT = "all-linear leaves out 88.9% of the block weights: model.layers.*.mlp.experts.gate_up_proj 59.1%"


def test_it_says_at_the_start_and_at_the_end_what_it_leaves_out_and_its_adapter_is_exported(tmp_path):
    config = write_config(tmp_path, model={"allow_unquantized": True}, training={"save_steps": 100})
    save_model("mixtral", tmp_path / "model")
    output = run_to_the_end(config, tmp_path / "run", tmp_path / "log")
    before, after = output.split("step  1/12", 1)
    assert before.count(LEFT_OUT) == 1
    assert after.count(f"not adapted      {LEFT_OUT}") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["left_out"].startswith(LEFT_OUT)
    exported = run_forked("export", str(tmp_path / "run"), "--format", "merged", "--output", str(tmp_path / "merged"))
    assert exported.status == 0, exported.output


def test_it_is_refused_by_all_commands_that_look_ahead_without_leave(tmp_path):
    config = write_config(tmp_path)
    save_model("mixtral", tmp_path / "model")
    for command in (("train", str(config), "--dry-run"), ("estimate", str(config))):
        refused = run_forked(*command)
        assert refused.status == 2, refused.output
        assert refused.output.count("error: ") == 1
        assert "model.quantization is nf4, but 88.9% of the block weights would stay in 16 bits" in refused.output
