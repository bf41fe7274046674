"""Runs that choose the modules of every block, and the run on another task that their plan trains."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.forked_run import finished_run, log_of, run_forked, run_to_the_end
from support.same_run import assert_same_course, assert_same_run, stopped_at
from support.tiny_run import write_run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dora_dist.adapter.plain_lora import read_lora_adapter
from dora_dist.console.files import read_lines
from dora_dist.method.layer_names import split_name

RULE: dict[str, Any] = {
    "adapter": {"target_rank": 2, "initial_rank": None},
    "pruning": {
        "rule": "modules_per_layer",
        "modules_per_layer": 3,
        "importance": "gate_sensitivity",
        "budget_unit": "parameters",
    },
}
LAYERS, KEPT = 14, 6
COSTS = {"q_proj": 128, "k_proj": 96, "v_proj": 96, "o_proj": 128, "gate_proj": 192, "up_proj": 192, "down_proj": 192}


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    """Configuration of a finished run of two ranks under ZeRO-2, a checkpoint after every step."""
    return finished_run(tmp_path_factory.mktemp("probe"), **RULE)[0]


def planned(run: Path) -> dict[str, int]:
    written: dict[str, int] = json.loads((run / "plan.json").read_text())["ranks"]
    return written


def test_the_modules_that_stay_are_a_plan_of_the_whole_budget(probe):
    run = probe.parent / "run"
    (event,) = read_lines(run / "allocation.jsonl")
    assert (event["step"], event["final"]) == (6, True)
    kept = {name for name, indices in event["kept"].items() if indices}
    assert len(event["kept"]) == LAYERS
    assert Counter(split_name(name).block for name in kept) == {"model.layers.0": 3, "model.layers.1": 3}
    plan = planned(run)
    assert plan.keys() == event["kept"].keys()
    assert {name for name, rank in plan.items() if rank} == kept
    spent = sum(COSTS[name.rsplit(".", 1)[1]] * rank for name, rank in plan.items())
    left = 2 * 2 * sum(COSTS.values()) - spent
    assert 0 <= left < max(COSTS[name.rsplit(".", 1)[1]] for name in kept)


@torch.no_grad()
def test_the_probe_ends_in_plain_lora_of_the_modules_that_stayed(probe):
    run = probe.parent / "run"
    adapter = read_lora_adapter(run / "adapter")
    assert {name: len(rows) for name, (rows, _) in adapter.items()} == {
        name: 2 for name, rank in planned(run).items() if rank
    }
    base = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    tokens = torch.arange(5, 25).view(2, 10)
    before = base(tokens).logits
    assert not torch.allclose(PeftModel.from_pretrained(base, run / "adapter")(tokens).logits, before, atol=1e-3)


def test_log_summary_and_report_say_what_has_been_planned(probe):
    run = probe.parent / "run"
    assert "step 6: 3 modules of every block stay, 6 of 14; the others have no adapter" in log_of(probe.parent / "log")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["planned"] == planned(run)
    assert summary["components_kept"] == 2 * KEPT
    reported = run_forked("report", run).output
    components = sum(planned(run).values())
    assert f"planned          {components} components for the 6 of 14 modules that stayed" in reported


def test_a_run_resumed_after_the_event_has_the_plan_still(probe, tmp_path):
    resumed = stopped_at(8, probe.parent / "run", tmp_path)
    run_to_the_end(probe, resumed, tmp_path / "log")
    assert_same_run(probe.parent / "run", resumed)
    assert planned(resumed) == planned(probe.parent / "run")


@pytest.mark.full("ranks")
@pytest.mark.parametrize("step", [0, 4])
def test_one_rank_makes_the_plan_of_two(probe, step, tmp_path):
    """From the start, or from the checkpoint of two ranks before the event."""
    run = stopped_at(step, probe.parent / "run", tmp_path) if step else tmp_path / "run"
    one = ("--training.per_device_train_batch_size", "8")
    run_to_the_end(probe, run, tmp_path / "log", *one, ranks=1)
    assert_same_course(probe.parent / "run", run, allocations=2)
    assert planned(run) == planned(probe.parent / "run")


@torch.no_grad()
@pytest.mark.full("ranks")
def test_the_plan_trains_another_task_and_no_other_module_has_an_adapter(probe, tmp_path):
    rows = [{"sentence1": f"w{n % 40} w{n % 7}", "label": ("no", "yes")[n % 2]} for n in range(40)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = planned(probe.parent / "run")
    config = write_run(
        tmp_path,
        {
            "task": "sequence_classification",
            "preset": "lora",
            "model": {"path": str(probe.parent / "model")},
            "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
            "adapter": {"initial_rank": None, "ranks": str(probe.parent / "run" / "plan.json")},
            "pruning": {"rule": "none"},
        },
    )
    run_to_the_end(config, tmp_path / "run", tmp_path / "log")
    kept = {name for name, rank in plan.items() if rank}
    written = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in written if ".lora_" in name}
    assert adapted == kept
    base = AutoModelForSequenceClassification.from_pretrained(probe.parent / "model", num_labels=2, pad_token_id=0)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert {name for name, _ in model.named_modules() if name.endswith("lora_A")} == {
        f"base_model.model.{name}.lora_A" for name in kept
    }
    batch = torch.tensor([[1, 9, 12], [1, 20, 30]])
    with model.disable_adapter():
        without = model(batch).logits
    assert not torch.allclose(model(batch).logits, without, atol=1e-3)
