"""Runs with prompt routing: the same course on one and two ranks, resumed bit for bit, and used afterwards."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.commands import steps_of
from support.forked_run import run_forked, run_that_fails, run_to_the_end
from support.same_run import evaluation_of, stopped_at
from support.tiny_models import load_base
from support.tiny_run import write_config
from transformers import AutoTokenizer

import dora_dist
from dora_dist.config.format_version import ROUTED_ADAPTER
from dora_dist.data.encoding.text import encode_prompts
from dora_dist.data.reading.samples import alpaca_prompt
from dora_dist.evaluation.answers import generate_answers
from dora_dist.routing.files import TENSORS

STAYS = {"rule": "none"}
ROUTED = {"routing": "prompt", "target_rank": 2, "initial_rank": None, "modules_per_prompt": 3, "balance_weight": 0.5}
COMPARED = ("loss", "grad_norm", "balance_loss", "equilibrium_penalty")
ON_ONE_RANK = ("--training.per_device_train_batch_size", "8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """12 steps on two ranks under ZeRO-2, with dropout; a checkpoint after every third step."""
    folder = tmp_path_factory.mktemp("routed")
    evaluation = {"before": True, "exact_match": True, "max_new_tokens": 4}
    adapter, training = {**ROUTED, "dropout": 0.1}, {"save_steps": 3}
    config = write_config(folder, adapter=adapter, pruning=STAYS, evaluation=evaluation, training=training)
    output = run_to_the_end(config, folder / "run", folder / "log")
    assert output.count("adapter.routing is prompt: the model runs layer by layer") == 1
    assert "routed by prompt: for dora-dist generate and dora_dist.load_adapter" in output
    return folder


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, tmp_path):
    resumed = stopped_at(6, run / "run", tmp_path)
    output = run_to_the_end(run / "run.yaml", resumed, tmp_path / "log")
    assert f"resuming from {resumed}/checkpoint-6" in output
    files = [f"adapter/{TENSORS}", "checkpoint-12/dynamic_lora.safetensors"]
    for name in files:
        old, new = load_file(run / "run" / name), load_file(resumed / name)
        assert old.keys() == new.keys()
        assert all(old[key].equal(new[key]) for key in old), name
    assert "head/routers.0.weight" in new, "routers are a part of the state of the method"
    lines = [[[line[key] for key in COMPARED] for line in steps_of(folder)] for folder in (run / "run", resumed)]
    assert lines[0] == lines[1]


def test_routers_learn_and_the_balancing_loss_is_logged(run):
    first, last = (load_file(run / "run" / f"checkpoint-{step}" / TENSORS) for step in (3, 12))
    for name in ("routers.0.weight", "routers.1.weight", "routers.0.pooler", "routers.1.pooler"):
        assert not torch.equal(first[name], last[name]), name
    assert all(line["balance_loss"] > 0 for line in steps_of(run / "run"))


@pytest.mark.full("ranks")
@pytest.mark.parametrize(
    ("engine", "packed"),
    [
        ("zero2", False),
        ("ddp", True),
        pytest.param("zero2", True, marks=pytest.mark.full("ranks")),
        pytest.param("ddp", False, marks=pytest.mark.full("ranks")),
    ],
)
def test_the_course_does_not_depend_on_the_number_of_ranks(tmp_path, engine, packed):
    data = {"batching": "packed", "max_length": 48} if packed else {}
    config = write_config(
        tmp_path, adapter=ROUTED, pruning=STAYS, data=data, training={"save_steps": 100, "max_steps": 8}
    )
    runs = [tmp_path / f"run-{ranks}" for ranks in (2, 1)]
    run_to_the_end(config, runs[0], tmp_path / "log-2", engine=engine)
    run_to_the_end(config, runs[1], tmp_path / "log-1", *ON_ONE_RANK, ranks=1, engine="none")
    two, one = map(steps_of, runs)
    for key in COMPARED:
        for a, b in zip(one, two, strict=True):
            assert b[key] == pytest.approx(a[key], rel=2e-3 if key == "grad_norm" else 2e-4), (key, a["step"])
    assert evaluation_of(runs[1])["eval_loss"] == pytest.approx(evaluation_of(runs[0])["eval_loss"], rel=2e-4)


@pytest.mark.full("ranks")
def test_generate_answers_with_what_was_trained(run):
    asked = ["w1 w2", "w7", "w30 w5 w6", "w11 w12"]
    finished = run_forked("generate", run / "run", "--prompt", *asked, "--input", "w3 w4", "--max-new-tokens", "6")
    assert finished.status == 0, finished.output
    model = dora_dist.load_adapter(load_base(run / "model"), run / "run" / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(run / "run" / "adapter")
    prompts = encode_prompts(tokenizer, [alpaca_prompt(text, "w3 w4") for text in asked])
    answers = [generate_answers(model, tokenizer, [ids], 6, [tokenizer.eos_token_id])[0] for ids in prompts]
    assert any(answers)
    found = [part.split("--- prompt")[0].strip() for part in finished.output.split("--- adapter\n")[1:]]
    assert found == answers


def test_the_adapter_of_a_checkpoint_is_used_too(run):
    options = ("--checkpoint", "checkpoint-3", "--max-new-tokens", "3")
    finished = run_forked("generate", run / "run", "--prompt", "w1", *options)
    assert finished.status == 0, finished.output


@pytest.mark.parametrize("kind", ["peft", "compact", "merged"])
def test_no_export_is_made_of_it(run, kind):
    finished = run_forked("export", run / "run", "--format", kind)
    assert finished.status == 2
    assert "was trained with adapter.routing prompt" in finished.output
    assert "no plain LoRA and no merged model computes the same" in finished.output
    assert "Traceback" not in finished.output
    assert not (run / "run" / f"export-{kind}").exists()


def test_other_routing_is_not_continued(run, tmp_path):
    resumed = stopped_at(6, run / "run", tmp_path)
    status, text = run_that_fails(
        run / "run.yaml",
        resumed,
        tmp_path / "log",
        "--adapter.modules_per_prompt",
        "4",
        "--adapter.balance_weight",
        "0",
    )
    assert status == 2
    assert "adapter.modules_per_prompt was 3 and is now 4" in text
    assert "adapter.balance_weight was 0.5 and is now 0" in text


def test_its_card_says_what_loads_it(run):
    card = ModelCard.load(run / "run" / "adapter" / "README.md")
    assert card.data.library_name == "dora-dist"
    assert "dora_dist.load_adapter" in card.text


def test_the_folder_names_its_base(run):
    about = json.loads((run / "run" / "adapter" / ROUTED_ADAPTER).read_text())
    assert about["base_model"] == str(run / "model")
