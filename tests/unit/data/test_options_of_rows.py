"""Values that a row gives to variables of the chat template, as SmolTalk2's rows do."""

import dataclasses
import json

import pytest
from support.byte_tokenizer import byte_tokenizer

from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.encoder import EncodingRules, Status
from dora_dist.data.row_formats import build_encoder, what_is_said
from dora_dist.generate.questions import PromptRequest, as_asked, read_questions
from dora_dist.runs.adapter_folder.use import Use

SWITCHED = (
    "{% if tool_names %}<|im_start|>system\n{{ tool_names | join(' ') }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not enable_thinking | default(true) %}<think>\n</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking | default(true) %}<think>\n</think>\n{% endif %}{% endif %}"
)
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
ASKED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
CLOSED = "<think>\n</think>\n"


def encode(*options, template=SWITCHED, rows=None, filled=False, **rules):
    """The columns of one conversation with each of these options."""
    encoder = build_encoder(
        byte_tokenizer("chatml"), EncodingRules(format="messages", template=template, bad_rows="skip", **rules)
    )
    rows = rows or [json.dumps({**TALK, "chat_template_kwargs": given}) for given in options]
    count = len(rows)
    return encoder({"place": ["row"] * count, "json": rows, "flaw": [""] * count, "filled": [filled] * count})


def texts(columns):
    assert set(columns["status"]) == {Status.KEPT}, columns["note"]
    return [byte_tokenizer("chatml").decode(ids) for ids in columns["input_ids"]]


def test_each_row_is_rendered_with_its_own_values():
    off, on, none, null, as_text, tools = texts(
        encode(
            {"enable_thinking": False},
            {"enable_thinking": True},
            None,
            {"enable_thinking": None},
            json.dumps({"enable_thinking": False}),
            {"tool_names": ["f", "g"]},
        )
    )
    assert off == as_text == f"{ASKED}{CLOSED}a<|im_end|>\n"
    assert on == none == null == f"{ASKED}a<|im_end|>\n"
    assert tools == f"<|im_start|>system\nf g<|im_end|>\n{ASKED}a<|im_end|>\n"


def test_the_empty_thought_of_a_row_is_prompt_and_no_answer():
    columns = encode({"enable_thinking": False})
    (start, end) = columns["spans"][0]
    assert byte_tokenizer("chatml").decode(columns["input_ids"][0][start:end]) == "a<|im_end|>"


def test_the_value_of_a_row_comes_before_that_of_all_rows():
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = SWITCHED
    template = choose_template(tokenizer, "auto", {"enable_thinking": False}).text
    own, of_all = texts(encode({"enable_thinking": True}, {}, template=template))
    assert (own, of_all) == (f"{ASKED}a<|im_end|>\n", f"{ASKED}{CLOSED}a<|im_end|>\n")


def test_a_switch_that_the_template_never_reads_is_counted_and_what_is_empty_is_not():
    columns = encode({"python_mode": False, "custom_instructions": "", "xml_tools": []})
    assert texts(columns) == [f"{ASKED}a<|im_end|>\n"]
    assert columns["unread"] == ["chat_template_kwargs.python_mode"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"xml_tools": ["f"]},
            r"'chat_template_kwargs.xml_tools' is never read by the chat template (it reads enable_",
        ),
        ({"enable_thinkin": "x"}, "is never read by the chat template; did you mean enable_thinking?"),
        ({"enable_thinking": "false"}, "is the text 'false', and the chat template asks only whether"),
        ({"messages": [{}]}, "'chat_template_kwargs.messages' is set by the program itself: leave it out"),
        ({"tool_names": ["<|im_end|>"]}, "field 'chat_template_kwargs' holds the control token '<|im_end|>'"),
        ("{", "field 'chat_template_kwargs' cannot be read as JSON"),
        (["enable_thinking"], "field 'chat_template_kwargs' must be an object with named values"),
    ],
)
def test_what_would_be_lost_or_mean_something_else_is_refused(options, message):
    columns = encode(options)
    assert columns["status"] == [Status.BAD]
    assert message in columns["note"][0]


def test_nulls_that_a_table_has_put_into_a_list_are_refused():
    columns = encode({"tool_names": [{"name": None}], "enable_thinking": None}, filled=True)
    assert "field 'chat_template_kwargs' has null at tool_names.0.name" in columns["note"][0]


def test_control_tokens_in_a_value_are_text_where_all_are():
    columns = encode({"tool_names": ["<|im_end|>"]}, control_tokens="text")
    assert texts(columns) == [f"<|im_start|>system\n<|im_end|><|im_end|>\n{ASKED}a<|im_end|>\n"]
    end = byte_tokenizer("chatml").convert_tokens_to_ids("<|im_end|>")
    assert columns["input_ids"][0].count(end) == 3


def test_rows_with_other_values_are_other_rows():
    said = [what_is_said({**TALK, "chat_template_kwargs": {"x": x}}, False, "messages", {}, None) for x in (1, 2)]
    assert said[0] != said[1]


@pytest.mark.parametrize("system", ["", "s"])
def test_generate_asks_with_the_values_of_a_line(system):
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = SWITCHED
    line = json.dumps({"messages": TALK["messages"][:1], "chat_template_kwargs": {"enable_thinking": False}})
    use = Use(
        **{field.name: None for field in dataclasses.fields(Use)}
        | {"chat": True, "prompts": [None], "fields": [{}], "ignore": [[]], "systems": [""]}
    )
    (question,) = as_asked(use, list(read_questions([line], raw=False)), system)
    assert isinstance(question, PromptRequest)
    before = f"<|im_start|>system\ns<|im_end|>\n{ASKED}" if system else ASKED
    assert question.prompt(tokenizer, chat=True) == before + CLOSED
