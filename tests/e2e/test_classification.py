"""Sequence classification: a tiny BERT, tables as GLUE has them, two ranks under ZeRO-2."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, matthews_corrcoef
from support.commands import steps_of
from support.forked_run import log_of, run_forked, run_to_the_end, start_run
from support.ranks import wait_for_ranks
from support.same_run import assert_invariant, assert_same_run, stopped_at
from support.tiny_encoders import save_tiny_encoder, write_classification
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@dataclass(frozen=True)
class Classification:
    config: Path
    run: Path
    output: str


@pytest.fixture(scope="module")
def classification(tmp_path_factory) -> Classification:
    folder = tmp_path_factory.mktemp("classification")
    config = write_classification(folder)
    return Classification(config, folder / "run", run_to_the_end(config, folder / "run", folder / "log"))


def held_out(folder: Path) -> list[list[str]]:
    return [line.split("\t")[1:] for line in (folder / "eval.tsv").read_text().splitlines()[1:]]


@torch.no_grad()
def test_stock_peft_predicts_what_was_measured(classification):
    summary = json.loads((classification.run / "summary.json").read_text())
    recorded = json.loads((classification.run / "run.json").read_text())
    assert recorded["data"]["labels"] == recorded["settings"]["labels"] == ["not_same", "same"]
    base = AutoModelForSequenceClassification.from_pretrained(classification.run.parent / "model", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(classification.run / "adapter")
    model = PeftModel.from_pretrained(base, classification.run / "adapter").eval()
    first, second, labels = zip(*held_out(classification.run.parent), strict=True)
    batch = tokenizer(list(first), list(second), padding=True, return_tensors="pt")
    assert batch["token_type_ids"].any()
    wanted = torch.tensor([recorded["data"]["labels"].index(label) for label in labels])
    outputs = model(**batch, labels=wanted)
    predicted = outputs.logits.argmax(1)
    assert summary["after"]["loss"] == pytest.approx(float(outputs.loss), rel=1e-4)
    assert summary["after"]["accuracy"] == accuracy_score(wanted, predicted)
    assert ", num_labels=2), " in classification.output, "the line that loads the adapter"
    assert summary["after"]["matthews"] == pytest.approx(matthews_corrcoef(wanted, predicted))
    assert summary["after"]["examples"] == len(labels) == 21
    assert f"accuracy         {summary['after']['accuracy']:.1%}  (21 examples)" in classification.output
    assert "Matthews" in classification.output


def test_every_checkpoint_holds_the_head_and_it_moves(classification):
    heads = [
        load_file(classification.run / f"checkpoint-{step}" / "dynamic_lora.safetensors")["head/classifier.weight"]
        for step in (1, 12)
    ]
    folded = load_file(classification.run / "adapter" / "adapter_model.safetensors")
    assert torch.equal(folded["base_model.model.classifier.weight"], heads[1])
    assert (heads[1] - heads[0]).abs().max() > 1e-3
    shards = [load_file(path) for path in (classification.run / "checkpoint-12").glob("optimizer/rank-*")]
    assert any("classifier.modules_to_save.default.weight:exp_avg" in name for shard in shards for name in shard)


@pytest.mark.parametrize("step", [5, 9], ids=["between prunes", "after the last prune"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits_with_its_head(classification, step, tmp_path):
    resumed = stopped_at(step, classification.run, tmp_path)
    wait_for_ranks(start_run(classification.config, resumed, tmp_path / "log"), timeout=120)
    assert f"resuming from {resumed}/checkpoint-{step}" in log_of(tmp_path / "log")
    assert_same_run(classification.run, resumed)


@pytest.mark.full("tasks")
def test_the_course_does_not_depend_on_ranks_or_accumulation(tmp_path):
    """Without dropout, which the base has too."""
    config = write_classification(tmp_path)
    save_tiny_encoder(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert_invariant(config, tmp_path, ("accuracy",))


@pytest.mark.full("tasks")
def test_regression_on_a_quantized_base(tmp_path):
    config = write_classification(tmp_path, numbers=True, model={"quantization": "nf4"})
    output = run_to_the_end(config, tmp_path / "run", tmp_path / "log")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"loss", "examples", "pearson", "spearman"} <= summary["after"].keys()
    assert f"Pearson          {summary['after']['pearson']:.4f}" in output
    losses = [step["loss"] for step in steps_of(tmp_path / "run")]
    assert sum(losses[-3:]) < sum(losses[:3])
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    assert "classifier" in saved["modules_to_save"]


@pytest.mark.parametrize("command", ["generate", "export", "preview", "estimate"])
def test_commands_for_causal_models_say_so(classification, command):
    arguments = {
        "generate": (str(classification.run), "--prompt", "w1"),
        "export": (str(classification.run), "--format", "merged"),
    }.get(command, (str(classification.config),))
    finished = run_forked(command, *arguments)
    assert finished.status != 0
    assert "task sequence_classification" in finished.output.replace("task is", "task")
    assert "Traceback" not in finished.output


def test_a_dry_run_says_what_it_would_be(classification, tmp_path):
    finished = run_forked("train", "--config", str(classification.config), "--dry-run", "--output_dir", "new")
    assert finished.status == 0, finished.output
    assert "13 adapted layers" in finished.output
