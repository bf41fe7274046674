"""Adapters in a folder of their own, without the run that they come from, and those of other programs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny_models import shake
from support.trained_run import (
    TrainedFolder,
    character_tokenizer,
    make_base,
    make_run,
    run_export,
    save_adapter,
    write_use,
)
from transformers import AutoModelForCausalLM

from dora_dist.config.parse import config_text, load_config
from dora_dist.console import files
from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.text import encode_prompts
from dora_dist.data.reading.samples import alpaca_prompt
from dora_dist.evaluation.answers import generate_answers
from dora_dist.generate import __main__ as command
from dora_dist.runs import checkpoint, records
from dora_dist.runs.adapter_folder.use import FORMAT, USE, Use

TEMPLATE = choose_template(character_tokenizer(), "plain").text


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolder:
    """A run on conversations with a message of the system, short answers, and a quantized base."""
    folder = tmp_path_factory.mktemp("chatting")
    made = make_run(folder / "run", make_base(folder / "base"))
    config = load_config(made.folder / records.CONFIG)
    config.data.system, config.evaluation.max_new_tokens = "Be brief.", 6
    (made.folder / records.CONFIG).write_text(config_text(config))
    about = made.folder / records.RUN
    files.write_json(about, {**files.read_json(about), "data": {"chat": True, "train": [{"format": "messages"}]}})
    write_template(made.folder / "adapter")
    return made


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of stock PEFT with other alphas than ranks, and nothing but what PEFT saves."""
    folder = tmp_path_factory.mktemp("foreign")
    base = AutoModelForCausalLM.from_pretrained(make_base(folder / "base"), dtype=torch.float32)
    torch.manual_seed(0)  # of A: an adapter that happens to change no answer would show nothing
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def write_template(adapter: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(adapter)


def answers(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    command.main([str(folder), "--prompt", "Say it.", *options])
    return capsys.readouterr().out


def test_an_adapter_copied_without_its_run_is_asked_as_in_its_run(chatting, tmp_path, capsys) -> None:
    wanted = answers(capsys, chatting.folder)
    assert "Be brief." in wanted
    assert wanted != answers(capsys, chatting.folder, "--system", "")
    copied = Path(shutil.copytree(chatting.folder / "adapter", tmp_path / "copy"))
    write_use(chatting.folder, copied)
    assert answers(capsys, copied) == wanted
    assert answers(capsys, copied, "--model.quantization", "nf4") == wanted
    exported = run_export(chatting, tmp_path / "peft", "--format", "peft")
    capsys.readouterr()
    assert answers(capsys, exported) == wanted


def test_an_adapter_in_the_folder_of_its_run_is_that_run_s(chatting, tmp_path, capsys, monkeypatch) -> None:
    """Also where nothing stands beside it, as in runs of earlier versions."""
    assert answers(capsys, chatting.folder / "adapter") == answers(capsys, chatting.folder)
    run = tmp_path / "run"
    shutil.copytree(chatting.folder, run, ignore=shutil.ignore_patterns("adapter"))
    save_adapter(shake(chatting.model, seed=5), run / "checkpoint-3")
    write_template(run / "checkpoint-3")
    with pytest.raises(ValueError, match="--checkpoint checkpoint-3 cannot be used: it was not completed"):
        command.main([str(run / "checkpoint-3"), "--prompt", "a"])
    checkpoint.seal(run / "checkpoint-3")
    wanted = answers(capsys, run, "--checkpoint", "checkpoint-3")
    monkeypatch.chdir(run / "checkpoint-3")
    assert answers(capsys, Path()) == wanted


def test_an_adapter_of_another_program_answers_as_in_stock_peft(foreign, capsys) -> None:
    """Its base says which tokenizer; without a chat template, questions are put as Alpaca has them."""
    command.main([str(foreign), "--prompt", "Say it.", "--model.quantization", "none", "--max-new-tokens", "12"])
    shown = capsys.readouterr()
    base = AutoModelForCausalLM.from_pretrained(foreign.parent / "base", dtype=torch.float32)
    tokenizer = character_tokenizer()
    ids = encode_prompts(tokenizer, [alpaca_prompt("Say it.")])
    before = generate_answers(base, tokenizer, ids, 12, [tokenizer.eos_token_id])[0]
    model = PeftModel.from_pretrained(base, str(foreign)).eval()
    after = generate_answers(model, tokenizer, ids, 12, [tokenizer.eos_token_id])[0]
    assert before != after, "the adapter changes the answer, or this test shows nothing"
    assert f"--- base\n{before.strip()}\n--- adapter\n{after.strip()}\n" in shown.out
    assert "does not say how its rows were worded: taken for ones under Alpaca's headings" in shown.err


def test_one_with_a_chat_template_beside_it_is_asked_in_it(foreign, tmp_path, capsys) -> None:
    copied = Path(shutil.copytree(foreign, tmp_path / "copy"))
    write_template(copied)
    shown = answers(capsys, copied, "--model.quantization", "none", "--max-new-tokens", "1")
    assert "--- prompt\n<s>### Instruction:\nSay it." in shown, "the template writes the start token"


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, [], r"does not say how its base was quantized .*give --model.quantization, one of nf4, int8, none"),
        ({}, ["--model.quantization", "fp8"], "--model.quantization is fp8, but must be one of nf4, int8, none"),
        ({}, ["--checkpoint", "checkpoint-3"], "--checkpoint is 'checkpoint-3', but .* is an adapter itself"),
        ({"base_model_name_or_path": None}, [], "does not say what its base is: give it with --model.path PATH"),
        (
            {"base_model_name_or_path": "/nowhere/base"},
            ["--model.quantization", "none"],
            "cannot be loaded: model.path '/nowhere/base' .*or give the base with --model.path PATH",
        ),
        ({"task_type": "SEQ_CLS"}, ["--model.quantization", "none"], "was trained with task sequence_classification"),
    ],
)
def test_what_an_adapter_does_not_say_is_asked_for(foreign, tmp_path, settings, options, message) -> None:
    copied = Path(shutil.copytree(foreign, tmp_path / "copy"))
    described = copied / "adapter_config.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), **settings}))
    with pytest.raises(ValueError, match=message):
        command.main([str(copied), "--prompt", "a", *options])


def test_a_folder_that_cannot_be_read_is_named(chatting, tmp_path) -> None:
    copied = Path(shutil.copytree(chatting.folder / "adapter", tmp_path / "copy"))
    write_use(chatting.folder, copied)
    said = json.loads((copied / USE).read_text())
    for text, message in (
        (json.dumps({**said, "format": FORMAT + 1}), rf"has format {FORMAT + 1}, but this version .*Update dora-dist"),
        ("{", rf"copy/{USE} cannot be read"),
        (json.dumps({"format": FORMAT, "task": "causal_lm"}), rf"copy/{USE} cannot be read: .*missing"),
    ):
        (copied / USE).write_text(text)
        with pytest.raises(ValueError, match=message):
            command.main([str(copied), "--prompt", "a"])
    (copied / "adapter_config.json").write_text("")
    with pytest.raises(ValueError, match=r"adapter_config.json cannot be read: .*copy the adapter's folder again"):
        command.main([str(copied), "--prompt", "a"])


def test_another_quantization_than_that_of_the_training_is_refused(chatting) -> None:
    with pytest.raises(ValueError, match=r"--model.quantization is int8, but .* was trained with nf4, and is used so"):
        command.main([str(chatting.folder), "--prompt", "a", "--model.quantization", "int8"])


def test_a_base_that_has_moved_is_given(chatting, tmp_path, capsys) -> None:
    """And one that the adapter does not fit is refused, though PEFT would take it without a word."""
    wanted = answers(capsys, chatting.folder)
    moved = Path(shutil.copytree(chatting.base, tmp_path / "moved"))
    assert answers(capsys, chatting.folder, "--model.path", str(moved)) == wanted
    for name, changes, there in (
        ("shallow", {"num_hidden_layers": 1}, "model.layers.1.*not there"),
        ("narrow", {"intermediate_size": 64}, "mlp.*128.*64"),
    ):
        other = make_base(tmp_path / name, **changes)
        with pytest.raises(ValueError, match=rf"is for .*{there} in this LlamaForCausalLM: give the base that"):
            command.main([str(chatting.folder), "--prompt", "a", "--model.path", str(other)])
    few = make_base(tmp_path / "few", vocab_size=40)
    with pytest.raises(ValueError, match=r"a prompt has the token .*, of 40 rows, has none: give the base that"):
        command.main([str(chatting.folder), "--prompt", "a", "--model.path", str(few)])


def test_a_folder_of_format_1_has_no_names_of_rows(tmp_path: Path) -> None:
    use = {field.name: None for field in dataclasses.fields(Use)} | {
        "fields": [{"input": "context"}],
        "ignore": [["x"]],
    }
    Use(**use).write(tmp_path)
    assert Use.read(tmp_path) == Use(**use)
    older = {name: value for name, value in use.items() if name not in ("fields", "ignore")}
    (tmp_path / USE).write_text(json.dumps({**older, "format": 1}))
    assert Use.read(tmp_path) == Use(**{**use, "fields": [{}], "ignore": [[]]})
