"""A run with new tokens: learned on two ranks, resumed bit for bit, loaded by stock PEFT, exported and used."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from support.commands import steps_of
from support.forked_run import run_forked, run_to_the_end
from support.same_run import RELATIVE, assert_same_run, stopped_at
from support.tiny_models import VOCABULARY, load_base
from support.tiny_run import write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_dist.adapter.plain_lora import read_new_rows
from dora_dist.base_model.new_tokens import fit_rows
from dora_dist.export import __main__ as export
from dora_dist.export.llama_cpp import NEEDED

TEXTS = ["<call>", "w1-w2"]
IDS = [VOCABULARY, VOCABULARY + 1]
ON_ONE_RANK = ("--training.per_device_train_batch_size", "8")


def config_with_new_tokens(folder, **sections):
    """Some words of the rows are written as new tokens."""
    adapter = {"new_tokens": TEXTS, **sections.pop("adapter", {})}
    config = write_config(folder, adapter=adapter, **sections)
    for name in ("train.jsonl", "eval.jsonl"):
        rows = (folder / name).read_text()
        (folder / name).write_text(rows.replace("w5 ", "<call> ").replace("w6 ", "w1-w2 "))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """12 steps on two ranks under ZeRO-2, with dropout; a checkpoint after every third step."""
    folder = tmp_path_factory.mktemp("tokens")
    evaluation = {"exact_match": True, "max_new_tokens": 3, "max_examples": 4}
    training = {"save_steps": 3}
    config = config_with_new_tokens(folder, adapter={"dropout": 0.1}, evaluation=evaluation, training=training)
    output = run_to_the_end(config, folder / "run", folder / "log")
    assert "2 new (<call>, w1-w2), whose rows have 256 trained parameters, outside of the budget" in output
    assert "rows of its head are trained (adapter.new_tokens)" in output
    assert f"AutoPeftModelForCausalLM.from_pretrained('{folder}/run/adapter')" in output
    assert "vllm serve" not in output
    return folder


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, tmp_path):
    resumed = stopped_at(6, run / "run", tmp_path)
    output = run_to_the_end(run / "run.yaml", resumed, tmp_path / "log")
    assert f"resuming from {resumed}/checkpoint-6" in output
    assert_same_run(run / "run", resumed)
    state = load_file(resumed / "checkpoint-12" / "dynamic_lora.safetensors")
    assert {name for name in state if name.startswith("head/")} == {
        "head/model.embed_tokens.new_rows",
        "head/lm_head.new_rows",
    }


def test_every_row_learns_and_the_budget_does_not_count_them(run):
    first, last = (read_new_rows(run / "run" / f"checkpoint-{step}") for step in (3, 12))
    assert list(last.ids) == IDS
    for name, rows in last.rows.items():
        assert (rows - first.rows[name]).abs().amax(1).min() > 1e-3, name
    kept = [json.loads(line)["kept"] for line in (run / "run" / "allocation.jsonl").read_text().splitlines()]
    assert sum(map(len, kept[-1].values())) == 2 * 14


@torch.no_grad()
def test_exports_compute_the_same_and_say_what_does_not_take_them(run, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(run / "run" / "adapter")
    ids = tokenizer("w1 w2 <call> w3 w1-w2 w4", return_tensors="pt").input_ids
    assert set(IDS) <= set(ids[0].tolist())
    stock = load_base(run / "model")
    fit_rows(stock, IDS)
    wanted = PeftModel.from_pretrained(stock, run / "run" / "adapter")(input_ids=ids).logits
    for kind in ("peft", "compact", "merged"):
        options = ("--dtype", "float32") if kind == "merged" else ()
        export.main([str(run / "run"), "--output", str(tmp_path / kind), "--format", kind, *options])
        assert AutoTokenizer.from_pretrained(tmp_path / kind).convert_tokens_to_ids(TEXTS) == IDS
        if kind == "merged":
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        else:
            base = load_base(run / "model")
            fit_rows(base, IDS)
            loaded = PeftModel.from_pretrained(base, tmp_path / kind)
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    for name in NEEDED:
        (tmp_path / "llama.cpp" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="a GGUF adapter has no place for rows of the embedding: give --part merged"):
        export.main([str(run / "run"), "--format", "gguf", "--llama-cpp", str(tmp_path / "llama.cpp")])
    said = capsys.readouterr().out
    for server in ("vLLM", "SGLang"):
        assert f"{server} does not take it: it holds rows of new tokens (adapter.new_tokens); --format merged" in said
    assert "It has the rows of 2 new tokens too" in (tmp_path / "peft" / "README.md").read_text()
    assert AutoPeftModelForCausalLM.from_pretrained(run / "run" / "adapter")(input_ids=ids).logits.isfinite().all()


def test_generate_reads_new_tokens_in_a_prompt(run):
    finished = run_forked("generate", run / "run", "--prompt", "w1 <call> w2", "--max-new-tokens", "4")
    assert finished.status == 0, finished.output
    assert "<call>" in finished.output


@pytest.mark.full("ranks")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_course_does_not_depend_on_ranks_and_engine(tmp_path, tied):
    config = config_with_new_tokens(tmp_path, training={"save_steps": 100, "max_steps": 8})
    if tied:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", tie_word_embeddings=True)
        model.tie_weights()
        model.save_pretrained(tmp_path / "model")
    runs = {}
    for engine, ranks in (("zero2", 2), ("ddp", 2), ("none", 1)):
        runs[engine] = tmp_path / engine
        options = ON_ONE_RANK if ranks == 1 else ()
        run_to_the_end(config, runs[engine], tmp_path / f"log-{engine}", *options, ranks=ranks, engine=engine)
    alone, rows = steps_of(runs["none"]), read_new_rows(runs["none"] / "adapter").rows
    assert len(rows) == (1 if tied else 2)
    for engine in ("zero2", "ddp"):
        for one, other in zip(alone, steps_of(runs[engine]), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=RELATIVE), (engine, one["step"])
        for name, found in read_new_rows(runs[engine] / "adapter").rows.items():
            torch.testing.assert_close(found, rows[name], rtol=1e-3, atol=1e-4)
