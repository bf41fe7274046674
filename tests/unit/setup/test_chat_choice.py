"""Which rows go into the chat template, with which prompt."""

import datetime
import json

import pytest
from support.byte_tokenizer import byte_tokenizer

from dora_dist.config.data import DataConfig
from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.control_tokens import control_tokens
from dora_dist.generate.questions import PromptRequest
from dora_dist.setup.run_data import prepare_data

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
PAIR = {"prompt": "1 + 2", "completion": "3"}
DIALOGUE = {"dialogue": "A: hi", "answers": {"text": ["short", "other"]}, "id": 7}
HEADINGS = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>"


def chat(question, answer, system=""):
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    before = turn.format("system", system) if system else ""
    return before + turn.format("user", question) + turn.format("assistant", answer)


def tokenizer_with_template():
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = choose_template(tokenizer).text
    return tokenizer


@pytest.fixture
def prepared(tmp_path):
    """``prepared(rows, tokenizer, **settings)``: the data of a run on these rows, and the first example as text."""

    def made(rows, tokenizer, **settings):
        for name, content in rows.items():
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(content) + "\n")
        paths = {name: str(tmp_path / f"{name}.jsonl") for name in rows}
        settings = {"train": paths["train"], "eval": paths.get("eval"), **settings}
        data = prepare_data(DataConfig(cache_dir=str(tmp_path / "cache"), **settings), tokenizer)
        return data, tokenizer.decode(data.train[0].dataset[0]["input_ids"])

    return made


@pytest.mark.parametrize(
    ("row", "own", "settings", "text"),
    [
        (ALPACA, True, {}, chat("Add.\n\n1 2", "3")),
        (ALPACA, True, {"as_chat": False}, HEADINGS),
        (ALPACA, False, {}, HEADINGS),
        (ALPACA, False, {"as_chat": True}, chat("Add.\n\n1 2", "3")),
        (PAIR, True, {}, chat("1 + 2", "3")),
        (PAIR, True, {"as_chat": False}, "1 + 23<|im_end|>"),
        (PAIR, True, {"system": "Be kind."}, chat("1 + 2", "3", system="Be kind.")),
        ({"text": "abc"}, True, {}, "abc<|im_end|>"),
    ],
)
def test_rows_go_into_the_tokenizers_own_template_unless_told_otherwise(prepared, row, own, settings, text):
    tokenizer = tokenizer_with_template() if own else byte_tokenizer("chatml")
    data, found = prepared({"train": row}, tokenizer, **settings)
    assert found == text
    assert (data.template is not None) == text.startswith("<|im_start|>")
    plainly_trained = own and settings.get("as_chat") is False
    assert any("ask the adapter with plain prompts" in remark for remark in data.remarks()) == plainly_trained


def test_held_out_data_in_another_form_than_the_training_data_are_refused(prepared, tmp_path):
    held_out = {"path": str(tmp_path / "eval.jsonl"), "as_chat": False}
    with pytest.raises(ValueError, match="source eval is rendered as plain prompts, but the training data in the chat"):
        prepared({"train": ALPACA, "eval": ALPACA}, tokenizer_with_template(), eval=held_out)


@pytest.mark.parametrize("as_chat", [True, False])
def test_a_prompt_of_ones_own_is_made_of_any_fields(prepared, tmp_path, as_chat):
    source = {
        "path": str(tmp_path / "train.jsonl"),
        "fields": {"completion": "answers.text.0"},
        "prompt": "Summarise {{it}}:\n{dialogue} ({answers.text.1}, {id})",
    }
    _, text = prepared({"train": DIALOGUE}, byte_tokenizer("chatml"), train=source, as_chat=as_chat)
    prompt = "Summarise {it}:\nA: hi (other, 7)"
    assert text == (chat(prompt, "short") if as_chat else f"{prompt}short<|im_end|>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt": "Summarise: {article}"},
            "field 'article' is missing, which the prompt names; the row has answers, dia",
        ),
        ({"prompt": "Summarise: {answers}"}, "field 'answers' must be text or a number for the prompt"),
        ({"prompt": "{dialogue}"}, "field 'completion' is missing"),
        ({"prompt": "{dialogue}", "format": "alpaca"}, "has a prompt of its own .* but the format alpaca"),
        ({"prompt": "{dialogue"}, "data.prompt is '{dialogue'.*write {{ and }}"),
        ({"prompt": "Summarise."}, "must name fields of the rows in braces"),
        (
            {"prompt": "{dialogue}", "system": "s", "as_chat": False},
            "a system message, which plain prompts have no place",
        ),
    ],
)
def test_a_prompt_that_cannot_be_made_is_refused(prepared, settings, message):
    with pytest.raises(ValueError, match=message):
        prepared({"train": DIALOGUE}, byte_tokenizer("chatml"), **settings)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "abc"}, {}, 'which texts have no place for: set system: "" for this source'),
        (PAIR, {"as_chat": False}, "which plain prompts have no place for: set as_chat: true for this source"),
    ],
)
def test_a_message_of_the_system_that_has_no_place_is_refused_with_a_way_out_that_works(
    prepared, tmp_path, row, settings, message
):
    settings = {"system": "Be kind.", **settings}
    with pytest.raises(ValueError, match=message):
        prepared({"train": row}, tokenizer_with_template(), **settings)
    way_out = {"system": ""} if "text" in row else {"as_chat": True}
    source = {"path": str(tmp_path / "train.jsonl"), **way_out}
    _, text = prepared({"train": row}, tokenizer_with_template(), **{**settings, "train": source})
    assert ("Be kind." in text) == ("text" not in row)


def test_a_prompt_that_is_rendered_already_is_refused_with_the_way_out(prepared):
    row = {"prompt": "<|im_start|>user\nq", "completion": "a"}
    with pytest.raises(ValueError, match=r"prompts that are rendered already need data\.as_chat: false"):
        prepared({"train": row}, tokenizer_with_template())


SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ opening | default('') }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening | default('') }}{% endif %}"
)


def test_options_of_the_template_hold_for_training_and_for_what_is_asked_with_the_saved_tokenizer(prepared, tmp_path):
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = SWITCHED
    plain, _ = prepared({"train": PAIR}, tokenizer)
    tokenizer.chat_template = SWITCHED
    data, text = prepared({"train": PAIR}, tokenizer, chat_template_kwargs={"opening": "Well, "})
    assert text.endswith("<|im_start|>assistant\nWell, 3<|im_end|>\n")
    tokenizer.save_pretrained(tmp_path / "adapter")
    saved = type(tokenizer).from_pretrained(tmp_path / "adapter")
    (row,) = data.train[0].dataset
    asked = PromptRequest(PAIR["prompt"]).ids(saved, True, control_tokens(saved))
    assert asked == row["input_ids"][: row["answer_start"]]
    assert tokenizer.decode(asked).endswith("<|im_start|>assistant\nWell, ")
    assert plain.train[0].folder != data.train[0].folder


@pytest.mark.parametrize("changes", [{"train_on_thoughts": False}, {"chat_template_kwargs": {"opening": ""}}])
def test_each_option_has_data_of_its_own_in_the_cache(prepared, changes):
    folders = set()
    for settings in ({}, changes):
        tokenizer = byte_tokenizer("chatml")
        tokenizer.chat_template = SWITCHED
        data, _ = prepared({"train": PAIR}, tokenizer, **settings)
        folders.add(data.train[0].folder)
    assert len(folders) == 2


@pytest.mark.parametrize("changes", [{"train_on_thoughts": False}, {"chat_template_kwargs": {"opening": ""}}])
def test_options_of_conversations_are_refused_where_there_is_none(prepared, changes):
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = SWITCHED
    with pytest.raises(ValueError, match=f"data.{next(iter(changes))} is set, but no source is rendered in a chat tem"):
        prepared({"train": PAIR}, tokenizer, as_chat=False, **changes)


WRITES_THE_DAY = "{{ day | default(strftime_now('%d %b %Y')) }}\n" + SWITCHED


def test_a_template_that_writes_the_date_keeps_that_of_the_prepared_rows_and_the_run_says_so(prepared, monkeypatch):
    class May1(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 5, 1)

    class May2(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 5, 2)

    found = []
    for clock in (May1, May2):
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        tokenizer = byte_tokenizer("chatml")
        tokenizer.chat_template = WRITES_THE_DAY
        found.append(prepared({"train": PAIR}, tokenizer))
    (first, text), (second, later) = found
    assert text == later
    assert text.startswith("01 May 2026\n")
    for data in (first, second):
        assert any(remark.startswith("the chat template writes the date") for remark in data.remarks())


def test_a_date_that_is_set_is_no_date_to_tell_of(prepared):
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = WRITES_THE_DAY
    data, text = prepared({"train": PAIR}, tokenizer, chat_template_kwargs={"day": "1 May 2026"})
    assert text.startswith("1 May 2026\n")
    assert not any("writes the date" in remark for remark in data.remarks())
