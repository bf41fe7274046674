"""What a run leaves behind, and the commands that read it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.documents import table_names
from support.forked_run import run_forked

from dora_dist.adapter.plain_lora import read_lora_adapter
from dora_dist.runs.checkpoint import checkpoints


def test_checkpoints_hold_the_adapter_and_nothing_of_the_base(reference):
    adapter_bytes = sum(
        value.nbytes for name, value in load_file(reference.run / "checkpoint-12" / "dynamic_lora.safetensors").items()
    )
    for folder in checkpoints(reference.run):
        shards = sorted(folder.glob("optimizer/rank-*.safetensors"))
        assert len(shards) == 2
        kinds = {name.rpartition(":")[2] for shard in shards for name in load_file(shard)}
        assert kinds == {"master", "exp_avg", "exp_avg_sq"}
        weights = [path for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")]
        # Folded adapter (of rank 8, though there are 4 components), unfolded one, master copy and two moments, and
        # the files' own overhead.
        assert sum(path.stat().st_size for path in weights) < 6 * adapter_bytes + 400_000


def test_the_adapter_in_every_checkpoint_is_the_trained_one(reference):
    scale = 4 / 4
    for folder in checkpoints(reference.run):
        state, factors = load_file(folder / "dynamic_lora.safetensors"), read_lora_adapter(folder)
        layers = {name.rsplit(".", 1)[0] for name in state}
        assert set(factors) <= layers
        for layer in layers:
            gate = torch.where(state[f"{layer}.component_mask"], state[f"{layer}.gate"], 0.0)
            update = scale * (state[f"{layer}.lora_b"] * gate) @ state[f"{layer}.lora_a"]
            found = factors[layer][1] @ factors[layer][0] if layer in factors else torch.zeros_like(update)
            torch.testing.assert_close(found, update, rtol=1e-5, atol=1e-6)


def test_the_end_of_a_run_says_how_large_its_adapter_is_with_and_without_padding(reference):
    assert reference.output.count("  adapter size     ") == 1
    assert f"(dora-dist export {reference.run} --format compact)" in reference.output


def test_the_line_that_it_ends_with_loads_the_adapter_in_stock_peft(reference):
    (line,) = re.findall(r"^  in Python +(.*)$", reference.output, re.MULTILINE)
    imported = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
    found = subprocess.run(
        [sys.executable, "-c", f"{imported}print(sorted({line}.peft_config['default'].target_modules)[0])"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert "proj" in found.stdout
    folder = reference.run / "adapter"
    assert re.search(rf"^  served by vLLM +vllm serve .* --max-lora-rank 8 .*NAME={folder}$", reference.output, re.M)
    assert re.search(rf"^  shared +hf upload USER/NAME {folder} ", reference.output, re.MULTILINE)


def test_every_adapter_has_a_card_of_its_own_training(reference):
    for folder, step in ((reference.run / "adapter", 12), (reference.run / "checkpoint-5", 5)):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "peft"
        assert (card.data.license, card.data.pipeline_tag) == ("unknown", "text-generation")
        assert card.data.base_model is None, "the Hub refuses the path of a folder"
        assert f"for `{reference.run.parent / 'model'}`" in card.text
        assert f"{step} of 12, 8 rows each" in card.text
        assert "as LoRA of rank 2, counted in components" in card.text
        for section in ("Data", "Ranks", "Versions", "Licence"):
            assert f"## {section}\n" in card.text


def test_the_records_are_complete(reference):
    settings = json.loads((reference.run / "run.json").read_text())
    assert settings["settings"]["optimizer steps"] == 12
    assert settings["versions"]["deepspeed"] != "not installed"
    events = [json.loads(line) for line in (reference.run / "allocation.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [1, 2, 4, 6]
    assert [event["final"] for event in events] == [False, False, False, True]
    assert (reference.run / "ranks.png").stat().st_size > 5_000


def test_the_fields_of_the_metrics_are_documented(reference):
    lines = [json.loads(line) for line in (reference.run / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {"loss", "peak_memory_bytes", "eval_loss", "train_runtime"} < names
    metrics = {name for name in names if name.startswith("eval_")}
    assert names - metrics - {"step"} <= table_names("files.md", "metrics.jsonl")


def test_the_report_is_drawn_again_from_the_files(reference):
    before = (reference.run / "summary.json").read_text()
    (reference.run / "ranks.png").unlink()
    finished = run_forked("report", str(reference.run), timeout=120)
    assert finished.status == 0, finished.output
    assert (reference.run / "ranks.png").exists()
    assert (reference.run / "summary.json").read_text() == before
    assert "components       56 -> 28" in finished.output


def test_the_exported_adapter_of_a_checkpoint_is_verified(reference, tmp_path):
    command = ("export", str(reference.run), "--format", "peft")
    finished = run_forked(*command, "--checkpoint", "checkpoint-5", "--output", str(tmp_path / "peft"), timeout=180)
    assert finished.status == 0, finished.output
    assert "largest difference" in finished.output
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("name", ["adapter", "checkpoint-5"])
def test_answers_are_shown_of_a_run_and_of_its_adapter_that_was_copied_elsewhere(reference, tmp_path, name):
    asked, checkpoint = ("--prompt", "w1 w2", "--input", "w5 w6"), ("--checkpoint", name) * (name != "adapter")
    finished = run_forked("generate", str(reference.run), *checkpoint, *asked)
    assert finished.status == 0, finished.output
    assert "--- base" in finished.output
    assert "--- adapter" in finished.output
    copied = shutil.copytree(reference.run / name, tmp_path / "copy")
    alone = run_forked("generate", str(copied), *asked)
    assert alone.status == 0, alone.output
    assert alone.output[alone.output.index("--- prompt") :] == finished.output[finished.output.index("--- prompt") :]
