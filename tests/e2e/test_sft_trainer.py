"""The examples, with the real TRL: SFTTrainer on an NF4 base."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.repository import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
pytestmark = [pytest.mark.full("trl"), pytest.mark.timeout(900)]


def run(*command, **environment):
    pytest.importorskip("trl", reason='the package trl is not installed: pip install "dora-dist[trl]"')
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", **environment}
    ended = subprocess.run(list(map(str, command)), env=variables, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout + ended.stderr


def same(folder, other):
    left, right = (load_file(one / "adapter_model.safetensors") for one in (folder, other))
    return left.keys() == right.keys() and all(right[name].equal(tensor) for name, tensor in left.items())


def test_the_script_meets_the_budget_and_goes_on_to_the_same_bits(tmp_path):
    script = (sys.executable, EXAMPLES / "sft_trainer.py", tmp_path, "--steps", 12)
    options = ("--importance", "gate_sensitivity", "--init", "inputs")
    said = run(*script, *options)
    assert "the last pruning event has kept 56 of 84 components" in said
    trained = load_file(tmp_path / "checkpoint-12" / "dynamic_lora.safetensors")
    assert {value.dtype for name, value in trained.items() if name.endswith(".gate")} == {torch.float32}
    assert sum(int(value.sum()) for name, value in trained.items() if name.endswith(".component_mask")) == 56
    (tmp_path / "adapter").rename(tmp_path / "left alone")
    run(*script, *options, "--resume", tmp_path / "checkpoint-6")
    assert same(tmp_path / "left alone", tmp_path / "adapter")


def test_two_ranks_hold_the_same_masks(tmp_path):
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, EXAMPLES / "sft_trainer.py")
    said = run(*launch, tmp_path, "--steps", 8, ACCELERATE_USE_CPU="true")
    # The ranks prove that they agree at every event, at every checkpoint and at the end, and would say so.
    assert "the last pruning event has kept 56 of 84 components" in said


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((EXAMPLES / "trainer.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{code}")
    assert "56 of 84" in run(sys.executable, tmp_path / "notebook.py")
