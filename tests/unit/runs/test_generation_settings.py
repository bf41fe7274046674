"""What an adapter's folder says of the end of its answers, and what is said where its base stops elsewhere."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.trained_run import TrainedFolder, character_tokenizer, make_base, make_run, run_export
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dora_dist.base_model.load import BaseModelSpec
from dora_dist.config.parse import config_text, load_config
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.console import files
from dora_dist.data.encoding.chat import choose_template
from dora_dist.runs import records
from dora_dist.runs.adapter_folder.generation import Needed, write_settings
from dora_dist.runs.adapter_folder.use import Use
from dora_dist.setup.adapter_use import describe_use

START, END = "<|im_start|>", "<|im_end|>"
END_ID, EOS_ID = 105, 2


def chatml_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    assert tokenizer.convert_tokens_to_ids([END, "</s>"]) == [END_ID, EOS_ID]
    return tokenizer


def chat_run(folder: Path, base: Path) -> TrainedFolder:
    """A run on conversations, with a base that has no template, or one of its own."""
    run = make_run(folder, base, quantization="none")
    about = run.folder / records.RUN
    files.write_json(about, {**files.read_json(about), "data": {"chat": True, "train": [{"format": "messages"}]}})
    config = load_config(run.folder / records.CONFIG)
    (run.folder / records.CONFIG).write_text(config_text(config))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = choose_template(tokenizer, "auto").text
    tokenizer.save_pretrained(run.folder / "adapter")
    write_settings(run.folder / "adapter", BaseModelSpec.of(config.model, CAUSAL_LM), chat=True)
    return run


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolder:
    """A run in ChatML, of a base that knows its tokens, has no template and stops at </s> only. Wherever it would write
    anything, it writes the end of a turn."""
    folder = tmp_path_factory.mktemp("bare")
    base = make_base(folder / "base")
    chatml_tokenizer().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = EOS_ID
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([[1, 40, 41]])).last_hidden_state[0, -1]
        model.lm_head.weight[END_ID] = 100 * states
    model.save_pretrained(base)
    return chat_run(folder / "run", base)


def use_of(run: TrainedFolder) -> str:
    config = load_config(run.folder / records.CONFIG)
    spec = BaseModelSpec.of(config.model, CAUSAL_LM)
    chat = Use.of(config, run.folder).chat
    return describe_use(run.folder, CAUSAL_LM, None, needed=write_settings(run.folder / "adapter", spec, chat))


def test_the_printed_lines_stop_where_training_ended_an_answer(bare: TrainedFolder) -> None:
    """Stock PEFT takes nothing of the adapter's tokens, and goes on after the end of a turn."""
    adapter = bare.folder / "adapter"
    lines = dict(line.strip().split(None, 2)[::2] for line in use_of(bare).splitlines() if " set " in line)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bare.base), adapter)
    prompt = {"input_ids": torch.tensor([[1, 40, 41]]), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 3}
    written = model.generate(**prompt)[0, 3:].tolist()
    assert END_ID in written[:-1], "or this shows nothing"
    exec(lines["then"], {"model": model})
    assert model.generate(**prompt)[0, 3:].tolist() == written[: written.index(END_ID) + 1]
    assert GenerationConfig.from_pretrained(adapter).eos_token_id == model.generation_config.eos_token_id
    assert GenerationConfig.from_pretrained(adapter).pad_token_id == 3


def test_servers_are_given_template_and_end_tokens_of_the_adapter(bare: TrainedFolder) -> None:
    adapter = bare.folder / "adapter"
    (served,) = [line for line in use_of(bare).splitlines() if "served by vLLM" in line]
    assert served.endswith(
        f" --lora-modules NAME={adapter} --chat-template {adapter}/chat_template.jinja --generation-config {adapter}"
    )
    assert START in (adapter / "chat_template.jinja").read_text()


def test_an_export_says_so_too_and_has_it_in_its_card(bare: TrainedFolder, tmp_path: Path, capsys) -> None:
    output = run_export(bare, tmp_path / "out", "--format", "peft")
    setting = f"model.generation_config.eos_token_id = [{EOS_ID}, {END_ID}]"
    said = capsys.readouterr().out
    assert f"{setting}     # the base does not stop at {END}" in said
    assert f"--chat-template {output}/chat_template.jinja --generation-config {output}" in said
    assert f"tokenizer = AutoTokenizer.from_pretrained('{output}')" in said
    card = " ".join((output / "README.md").read_text().split())
    assert f"then set {setting}" in card
    assert "tokenizer = AutoTokenizer.from_pretrained('path/to/this/folder')" in card
    merged = run_export(bare, tmp_path / "merged", "--format", "merged")
    ends = [GenerationConfig.from_pretrained(folder).eos_token_id for folder in (output, merged)]
    assert ends == [[EOS_ID, END_ID]] * 2


def test_nothing_is_said_where_base_and_adapter_agree(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "auto").text
    tokenizer.save_pretrained(base)
    GenerationConfig(eos_token_id=[EOS_ID, END_ID], temperature=0.5, do_sample=True).save_pretrained(base)
    run = chat_run(tmp_path / "run", base)
    said = use_of(run)
    assert "then set" not in said
    assert "and take" not in said
    assert said.splitlines()[1].endswith(f"--lora-modules NAME={run.folder}/adapter")
    own = GenerationConfig.from_pretrained(run.folder / "adapter")
    assert (own.eos_token_id, own.temperature) == ([EOS_ID, END_ID], 0.5)


def test_plain_texts_need_the_end_token_only(bare: TrainedFolder) -> None:
    spec = BaseModelSpec(path=str(bare.base))
    assert write_settings(bare.folder / "adapter", spec, chat=False) == Needed()
