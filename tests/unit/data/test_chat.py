"""Chat templates: the exact tokens that are trained in a conversation, with the template's own marks and without."""

import itertools
import json
import re

import pytest
from support.byte_tokenizer import FAMILIES, byte_tokenizer

from dora_dist.data.encoding.chat import ChatRenderer, choose_template, stop_tokens
from dora_dist.data.encoding.encoder import IGNORED, EncodingRules
from dora_dist.data.encoding.text import labels_of
from dora_dist.data.reading.samples import Chat, RowFlaw
from dora_dist.data.row_formats import build_encoder

TURNS = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "ä2"), ("user", "q3"), ("assistant", "a3")]
CONVERSATION = [{"role": role, "content": content} for role, content in TURNS]
SYSTEM = {"role": "system", "content": "Be kind."}
EXPECTED = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[a1<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[ä2<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nq3<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[a3<|eot_id|>]]"
    ),
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\n[[a1<|im_end|>]]\n<|im_start|>user\nq2<|im_end|>\n"
        "<|im_start|>assistant\n[[ä2<|im_end|>]]\n<|im_start|>user\nq3<|im_end|>\n"
        "<|im_start|>assistant\n[[a3<|im_end|>]]\n"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe kind.\n\nq1<end_of_turn>\n<start_of_turn>model\n[[a1<end_of_turn>]]\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n[[ä2<end_of_turn>]]\n"
        "<start_of_turn>user\nq3<end_of_turn>\n<start_of_turn>model\n[[a3<end_of_turn>]]\n"
    ),
    "mistral": ("<s>[INST] Be kind.\n\nq1 [/INST][[ a1</s>]][INST] q2 [/INST][[ ä2</s>]][INST] q3 [/INST][[ a3</s>]]"),
    "plain": (
        "<s>Be kind.\n\n### Instruction:\nq1\n\n### Response:\n[[a1</s>]]\n"
        "### Instruction:\nq2\n\n### Response:\n[[ä2</s>]]\n### Instruction:\nq3\n\n### Response:\n[[a3</s>]]\n"
    ),
}
# ChatML that leaves the thoughts of earlier answers out, as newer models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}(thought) {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def without_marks(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def encode(tokenizer, template: str, messages: list[dict], **rules) -> list[tuple[list[int], list[int]]]:
    encoder = build_encoder(tokenizer, EncodingRules(format="messages", template=template, **rules))
    columns = encoder(
        {"place": ["here"], "json": [json.dumps({"messages": messages})], "flaw": [""], "filled": [False]}
    )
    return list(zip(columns["input_ids"], columns["spans"], strict=True))


def marked(tokenizer, ids: list[int], spans: list[int]) -> str:
    """The text, with ``[[ ]]`` around what is trained."""
    edges = [0, *spans, len(ids)]
    parts = [tokenizer.decode(ids[start:end]) for start, end in itertools.pairwise(edges)]
    return "".join(f"[[{part}]]" if number % 2 else part for number, part in enumerate(parts))


@pytest.mark.parametrize("marks", [True, False], ids=["with the template's marks", "from renderings alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answers_and_their_ends_are_trained(family, marks):
    tokenizer = byte_tokenizer(family)
    template = choose_template(tokenizer).text
    ((ids, spans),) = encode(tokenizer, template if marks else without_marks(template), [SYSTEM, *CONVERSATION])
    assert marked(tokenizer, ids, spans) == EXPECTED[family]
    labels = labels_of(ids, spans)
    trained = sum(end - start for start, end in zip(spans[::2], spans[1::2], strict=True))
    assert trained == sum(label != IGNORED for label in labels)
    end = ChatRenderer(tokenizer, template).end_of_turn
    assert labels.count(end) == 3, "also where it is the padding token, as it is in some of these"


@pytest.mark.parametrize("marks", [True, False], ids=["with the template's marks", "from renderings alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_words_of_an_answer_are_not_trained_where_others_say_them(family, marks):
    """Whoever looks for an answer in the text finds it in the question, and roles of the template in the answer."""
    tokenizer = byte_tokenizer(family)
    template = choose_template(tokenizer).text
    words = "user\nassistant\nmodel"
    messages = [{**SYSTEM, "content": words}] + [{**message, "content": words} for message in CONVERSATION]
    ((ids, spans),) = encode(tokenizer, template if marks else without_marks(template), messages)
    expected = re.sub(r"Be kind\.|[qaä][123]", words, EXPECTED[family])
    assert marked(tokenizer, ids, spans) == expected


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_answer_only_or_everything(family, marks):
    tokenizer = byte_tokenizer(family)
    template = choose_template(tokenizer).text
    template = template if marks else without_marks(template)
    whole = EXPECTED[family].replace("[[", "").replace("]]", "")
    ((ids, spans),) = encode(tokenizer, template, [SYSTEM, *CONVERSATION], train_on="last")
    head, _, tail = EXPECTED[family].rpartition("[[")
    assert marked(tokenizer, ids, spans) == head.replace("[[", "").replace("]]", "") + "[[" + tail
    ((ids, spans),) = encode(tokenizer, template, [SYSTEM, *CONVERSATION], train_on="everything")
    assert marked(tokenizer, ids, spans) == f"[[{whole}]]"
    assert labels_of(ids, spans)[0] == IGNORED, "nothing predicts the first token"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_before_an_answer_is_the_prompt_that_the_template_makes(family):
    """Otherwise the model would be asked in other tokens than it was trained on."""
    tokenizer = byte_tokenizer(family)
    tokenizer.chat_template = choose_template(tokenizer).text
    ((ids, spans),) = encode(tokenizer, tokenizer.chat_template, CONVERSATION)
    for number, start in enumerate(spans[::2]):
        asked = CONVERSATION[: 2 * number + 1]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert ids[:start] == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_at_the_end_token_and_at_that_of_a_turn(family):
    tokenizer = byte_tokenizer(family)
    assert stop_tokens(tokenizer, None) == [tokenizer.eos_token_id]
    last = re.search(r"(<[^<]+>)\]\]\n?$", EXPECTED[family])[1]
    ends = {tokenizer.eos_token, last}
    assert set(tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer, choose_template(tokenizer).text))) == ends


def test_an_end_of_turn_outside_the_templates_marks_is_trained():
    tokenizer = byte_tokenizer("chatml")
    template = choose_template(tokenizer).text.replace(
        '{{- message.content + "<|im_end|>" -}}{%- endgeneration -%}',
        '{{- message.content -}}{%- endgeneration -%}{{- "<|im_end|>" -}}',
    )
    ((ids, spans),) = encode(tokenizer, template, [SYSTEM, *CONVERSATION])
    assert marked(tokenizer, ids, spans) == EXPECTED["chatml"]


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_every_answer():
    tokenizer = byte_tokenizer("chatml")
    examples = encode(tokenizer, FORGETFUL, CONVERSATION)
    assert [marked(tokenizer, ids, spans) for ids, spans in examples] == [
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[(thought) a1<|im_end|>]]\n",
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[[(thought) ä2<|im_end|>]]\n",
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\nä2<|im_end|>\n"
        "<|im_start|>user\nq3<|im_end|>\n<|im_start|>assistant\n[[(thought) a3<|im_end|>]]\n",
    ]
    ((ids, spans),) = encode(tokenizer, FORGETFUL, CONVERSATION, train_on="last")
    assert (ids, spans) == examples[-1]


def test_a_template_that_ends_a_turn_without_a_control_token_is_refused():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match=r"without a control token .*set data\.chat_template"):
        ChatRenderer(byte_tokenizer(), template)


def test_a_control_token_before_the_answer_is_not_its_end():
    """Nothing of the answer would be trained."""
    template = "{% for m in messages %}{{ m.role }}<|im_start|>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant{% endif %}"
    with pytest.raises(ValueError, match=r"without a control token .*set data\.chat_template"):
        ChatRenderer(byte_tokenizer("chatml"), template)


def test_a_generation_prompt_that_the_answer_does_not_go_on_from_is_refused():
    template = FORGETFUL.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    with pytest.raises(ValueError, match="does not go on from the template's generation prompt"):
        ChatRenderer(byte_tokenizer("chatml"), template)


@pytest.mark.parametrize("family", ["gemma", "mistral"])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([CONVERSATION[0], *CONVERSATION], "must take turns"),
        ([{"role": "tool", "content": "4"}, *CONVERSATION], "cannot render tools"),
    ],
)
def test_what_a_family_does_not_know_is_refused(family, messages, message):
    tokenizer = byte_tokenizer(family)
    with pytest.raises(RowFlaw, match=message):
        ChatRenderer(tokenizer, choose_template(tokenizer).text).spans(Chat(messages))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bundled_template_is_taken_only_where_the_tokenizer_has_none(family):
    tokenizer = byte_tokenizer(family)
    chosen = choose_template(tokenizer)
    assert chosen.bundled
    assert f"the bundled one for {family}" in chosen.origin
    tokenizer.chat_template = "own"
    assert choose_template(tokenizer).text == "own"
    assert not choose_template(tokenizer).bundled
    assert choose_template(tokenizer, family).text == chosen.text


def test_an_answer_before_any_question_is_named_with_the_way_out_where_the_template_begins_otherwise():
    template = "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nS<|im_end|>\n"
    template += "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    greeting, *others = [{"role": "assistant", "content": "Hi"}, *CONVERSATION[1:3]]
    tokenizer = byte_tokenizer("chatml")
    message = r"field 'messages\[0\]' is an answer before anything is asked, .*: set weight: 0 on it"
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, template, [greeting, *others])
    ((ids, spans),) = encode(tokenizer, template, [{**greeting, "weight": 0}, *others])
    assert marked(tokenizer, ids, spans).startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>"
    )
    assert marked(tokenizer, ids, spans).count("[[") == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("llama3", r"data\.chat_template is llama3, but the tokenizer does not know <\|start_header_id\|>"),
        ("llama4", "data.chat_template is 'llama4', but must be auto, one of llama3, .*or the path of a Jinja file"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        choose_template(byte_tokenizer(), wanted)


def test_a_template_of_ones_own(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert choose_template(byte_tokenizer(), str(tmp_path / "own.jinja")).text == "{{ messages }}"
