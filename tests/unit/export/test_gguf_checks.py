"""What is checked around llama.cpp's converters, without them: where they are, and the vocabulary that they write."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sentencepiece_base import CHAT, END_OF_TURN, make_tokenizer
from support.trained_run import TrainedFolder, run_export
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dora_dist.adapter.plain_lora import read_lora_adapter
from dora_dist.console.errors import ExpectedRunError
from dora_dist.export import to_gguf
from dora_dist.export.llama_cpp import NEEDED, VARIABLE, LlamaCpp, find_llama_cpp
from dora_dist.export.read_gguf import update_norm
from dora_dist.runs.trained_run import open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "base"
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields that a faultless converter writes for a run on conversations."""
    number = len(tokenizer)
    special = {token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokenizer.convert_ids_to_tokens(list(range(number))),
        "tokenizer.ggml.token_type": [
            to_gguf.CONTROL if token in special else to_gguf.NORMAL for token in range(number)
        ],
        "tokenizer.ggml.scores": [-float(token) for token in range(number)],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": CHAT,
    }


def test_without_a_folder_it_is_said_how_to_get_llama_cpp(
    run: TrainedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"--llama-cpp FOLDER, or in the environment as LLAMA_CPP. `git clone"):
        run_export(run, tmp_path / "out", "--format", "gguf")
    with pytest.raises(ValueError, match=r"--llama-cpp is .*, but there is no convert_hf_to_gguf.py: .*git clone"):
        run_export(run, tmp_path / "out", "--format", "gguf", "--llama-cpp", str(tmp_path))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"LLAMA_CPP of the environment is .*/gone, but there is no"):
        run_export(run, tmp_path / "out", "--format", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_llama_cpp_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDED:
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert find_llama_cpp(None) == find_llama_cpp(tmp_path)


def test_what_a_converter_says_last_is_quoted(tmp_path: Path) -> None:
    for name in NEEDED[:2]:
        (tmp_path / name).write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    (tmp_path / NEEDED[2]).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"refuses model and tokenizer: NotImplementedError: BPE pre-tok.*--format peft"
    ):
        find_llama_cpp(tmp_path).convert_model(tmp_path, tmp_path / "out.gguf", "f32")


def test_the_same_vocabulary_is_accepted(tokenizer: PreTrainedTokenizerBase) -> None:
    to_gguf.check_vocabulary(vocabulary(tokenizer), tokenizer, chat=True)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        (
            "tokens",
            lambda tokens: [*tokens[:-1], "[PAD400]"],
            rf"token 400 is '{END_OF_TURN}' .* '\[PAD400\]' in the file",
        ),
        ("tokens", lambda tokens: tokens[:-1], f"token 400 is '{END_OF_TURN}' in the run's tokenizer, and None"),
        ("token_type", lambda types: [*types[:-1], to_gguf.NORMAL], f"400 .'{END_OF_TURN}'. is a special one"),
        ("scores", lambda scores: [-1000.0 for _ in scores], "the base has no tokenizer.model: put that file"),
        ("add_space_prefix", lambda _: True, "a mark of a word in one and not in the other"),
        ("eos_token_id", lambda token: token + 1, "the end token is 2 in the run's tokenizer, and 3"),
    ],
)
def test_a_vocabulary_that_llama_cpp_would_read_otherwise_is_refused(
    tokenizer: PreTrainedTokenizerBase, field: str, change: Any, message: str
) -> None:
    fields = vocabulary(tokenizer)
    fields[f"tokenizer.ggml.{field}"] = change(fields[f"tokenizer.ggml.{field}"])
    with pytest.raises(ValueError, match=message):
        to_gguf.check_vocabulary(fields, tokenizer, chat=True)


def test_another_chat_template_matters_to_a_run_on_conversations(tokenizer: PreTrainedTokenizerBase) -> None:
    fields = {**vocabulary(tokenizer), "tokenizer.chat_template": "{{ messages }}"}
    to_gguf.check_vocabulary({**fields, "tokenizer.ggml.add_space_prefix": True}, tokenizer, chat=False)
    with pytest.raises(ValueError, match="chat template is not the one"):
        to_gguf.check_vocabulary(fields, tokenizer, chat=True)


def test_the_converter_gets_added_tokens_and_the_file_of_sentencepiece(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    to_gguf.complete_tokenizer(tmp_path, tokenizer, str(folder), chat=True)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["added_tokens_decoder"]["400"] == {"content": END_OF_TURN, "special": True}
    assert written["eos_token"] == "</s>"
    assert written["add_prefix_space"] is False
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("chat", "template", "marked"),
    [(False, CHAT, True), (True, CHAT, False), (True, CHAT.removeprefix("{{ bos_token }}"), True)],
)
def test_the_first_word_is_marked_as_where_prompts_of_the_run_begin(
    folder: Path, chat: bool, template: str, marked: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    assert to_gguf.marks_first_word(tokenizer, chat) == marked


def test_end_tokens_have_names_in_the_file(tokenizer: PreTrainedTokenizerBase) -> None:
    assert to_gguf.further_ends([2], tokenizer) == {}
    assert to_gguf.further_ends([2, 400], tokenizer) == {"eot": 400}
    assert to_gguf.further_ends([2, 400, 9], tokenizer) == {"eot": 400, "eom": 9}
    with pytest.raises(ValueError, match=rf"stops at 4 tokens .*{END_OF_TURN}.* has room for 3: remove"):
        to_gguf.further_ends([2, 400, 9, 10], tokenizer)


def test_an_update_has_the_size_that_llama_cpp_gives_it() -> None:
    lora_a, lora_b = torch.randn(3, 5), torch.randn(7, 3)
    wanted = (2.0 / 3 * lora_b @ lora_a).norm().item()
    assert update_norm(lora_a.numpy(), lora_b.numpy(), alpha=2.0) == pytest.approx(wanted, rel=1e-5)


class Converters(LlamaCpp):
    """Those of an adapter, where there is no llama.cpp: what is written is what is read."""

    def convert_adapter(self, source: Path, base: Path, target: Path) -> None:
        target.write_text(str(read_lora_adapter(source).keys()))
        shutil.copytree(source, self.folder)

    def read(self, file: Path) -> dict[str, Any]:
        factors = read_lora_adapter(self.folder).values()
        return {"updates": sorted(update_norm(a.numpy(), b.numpy(), alpha=len(a)) for a, b in factors)}


def test_it_is_said_that_an_adapter_is_checked_by_sizes_and_not_by_logits(run: TrainedFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    converters = Converters(tmp_path / "converted")
    exported = to_gguf.export_gguf(open_run(run.folder), tmp_path / "out", converters, ["adapter"], "bfloat16", False)
    assert exported.how_checked == "the size of every update in adapter.gguf, as read back, against that of the run"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter.gguf"]


def test_updates_that_are_missing_or_of_another_size_are_refused() -> None:
    factors = {name: (torch.randn(2, 5), torch.randn(7, 2)) for name in "abc"}
    found = sorted((lora_b @ lora_a).norm().item() for lora_a, lora_b in factors.values())
    assert to_gguf.check_updates(found, factors) < 1e-6
    with pytest.raises(ExpectedRunError, match="2 updates, where the run has 3"):
        to_gguf.check_updates(found[:2], factors)
    with pytest.raises(ExpectedRunError, match=r"sizes that differ by 1.0e-03"):
        to_gguf.check_updates([found[0], 1.001 * found[1], found[2]], factors)
