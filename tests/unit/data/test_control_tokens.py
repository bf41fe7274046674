"""Control tokens in somebody's text: refused, all rows at once, or written as text by every kind of tokenizer."""

import json
import re

import pytest
from support.byte_tokenizer import FAMILIES, byte_tokenizer
from support.tiny_run import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dora_dist.config.data import DataConfig
from dora_dist.data.encoding.chat import ChatRenderer, choose_template
from dora_dist.data.encoding.control_tokens import LAST_PRIVATE, control_tokens
from dora_dist.data.encoding.encoder import EncodingRules, Status
from dora_dist.data.prepared import LEFT_OUT
from dora_dist.data.reading.samples import alpaca_prompt
from dora_dist.data.row_formats import build_encoder
from dora_dist.setup.run_data import prepare_data

LETTERS = "abcdefghijklmnopqrstuvwxyz#:IR <>|_/[]\n"
EXCHANGE = {"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}
CALLING = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class SlowTokenizer:
    """One without tokenizer.json."""

    is_fast = False

    def __init__(self) -> None:
        self.added_tokens_decoder = {2: AddedToken("</s>", special=True)}


def fast(tokenizer: Tokenizer, *control: str, **flags: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of ``<s>``, ``</s>`` and ``control``, which puts ``<s>`` before a text."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, **flags) for token in ("<s>", "</s>", *control)])
    ids = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: control tokens are pieces with the best score, which match in texts too."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|im_end|>", 0.0), ("▁", -2.0), ("im", -2.5)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((letter, -3.0) for letter in LETTERS if letter != " ")], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return fast(tokenizer, "<unk>", "<|im_end|>", "<|im_start|>")


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank before everything, bytes for what is unknown."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "▁", *"abim", "im"])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    model = models.BPE(vocab=vocabulary, merges=[("i", "m")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(tokenizer, "<|im_start|>", "<|im_end|>")


def stripping() -> PreTrainedTokenizerFast:
    """As Phi-3's: control tokens take the white space after them away."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer, "<|im_start|>", "<|im_end|>", rstrip=True)


def word_pieces(**flags: bool) -> PreTrainedTokenizerFast:
    """As BERT's: the text of a control token becomes its signs and letters."""
    signs = ["[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "[", "]", "<", ">", "/"]
    words = [*signs, *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    model = models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return fast(tokenizer, "[CLS]", "[SEP]", **flags)


KINDS = {
    **{family: lambda family=family: byte_tokenizer(family) for family in FAMILIES},
    "unigram": unigram,
    "sentencepiece BPE": sentencepiece_bpe,
    "strips": stripping,
    "word pieces": word_pieces,
}


def encode(tokenizer, rows, **rules):
    encoder = build_encoder(tokenizer, EncodingRules(**rules))
    places = [f"row {number}" for number in range(1, len(rows) + 1)]
    return encoder(
        {
            "place": places,
            "json": [json.dumps(row) for row in rows],
            "flaw": [""] * len(rows),
            "filled": [False] * len(rows),
        }
    )


def special(tokenizer, ids) -> list[str]:
    """The control tokens among ids, in their order."""
    return tokenizer.convert_ids_to_tokens([number for number in ids if number in controls_of(tokenizer)])


def controls_of(tokenizer) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_control_token_has_no_control_token(kind):
    tokenizer = KINDS[kind]()
    controls = control_tokens(tokenizer, "text")
    for number in controls_of(tokenizer):
        token = tokenizer.convert_ids_to_tokens(number)
        if controls.refused.search(token):
            assert kind in ("unigram", "word pieces")
            assert token in ("<unk>", "[UNK]", "[CLS]", "[SEP]")
            continue
        for text in (token, f"a{token}b", f"a {token} b", f"{token}{token}"):
            ids = controls.writer(text, add_special_tokens=False)["input_ids"]
            assert not controls_of(tokenizer).intersection(ids), text
            assert tokenizer.decode(ids).replace(" ", "").casefold() == text.replace(" ", "").casefold()
        named = controls.exchanged(f"{token}ab")
        assert len(named) == len(token) + 2
        assert controls.exchanged(named) == f"{token}ab"
        assert controls.writer(named, add_special_tokens=False)["input_ids"][0] == number


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_have_the_same_tokens_either_way(kind):
    tokenizer = KINDS[kind]()
    writer = control_tokens(tokenizer, "text").writer
    for text in ("a b", " a\n\nb ", "im", "ab <|x|> [a] /", ""):
        assert writer(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert writer(text, text)["input_ids"] == tokenizer(text, text)["input_ids"]
    assert (writer.eos_token_id, writer.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_about_control_tokens_keeps_those_of_its_template(family):
    tokenizer = byte_tokenizer(family)
    template, about = choose_template(tokenizer).text, FAMILIES[family][0][-1]
    messages = [{"role": "user", "content": f"What is {about}?"}, {"role": "assistant", "content": f"{about} ends."}]
    rows = [{"messages": messages}, {"messages": [*EXCHANGE]}]
    columns = encode(tokenizer, rows, format="messages", template=template, control_tokens="text")
    assert columns["controls"] == [[about], []]
    ids, plain = columns["input_ids"]
    assert special(tokenizer, ids) == special(tokenizer, plain), "those that the template writes"
    expected = tokenizer.decode(plain).replace("first", f"What is {about}?").replace("second", f"{about} ends.")
    assert tokenizer.decode(ids) == expected
    start, end = columns["spans"][0]
    assert tokenizer.decode(ids[start : end - 1]).strip() == f"{about} ends."
    assert ids[end - 1] == ChatRenderer(tokenizer, template).end_of_turn
    assert columns["answer"][0].strip() == f"{about} ends.", "what a generated answer is compared with"


def test_thoughts_calls_and_tools_are_texts_too():
    tokenizer = byte_tokenizer("chatml")
    function = {"name": "f", "description": "ends by <|im_end|>", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_start|>": "<|im_end|>"}}}
    answer = {"role": "assistant", "reasoning_content": "<|endoftext|>", "tool_calls": [call]}
    row = {"messages": [EXCHANGE[0], answer], "tools": tools}
    (refused,) = encode(tokenizer, [row], format="messages", template=CALLING)["note"]
    assert refused.startswith("field 'messages[1].tool_calls' holds the control token '<|im_start|>'")
    columns = encode(tokenizer, [row], format="messages", template=CALLING, control_tokens="text")
    assert sorted(columns["controls"][0]) == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    (ids,), (span,) = columns["input_ids"], columns["spans"]
    assert special(tokenizer, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    wanted = '<think><|endoftext|></think>f {"<|im_start|>": "<|im_end|>"}<|im_end|>'
    assert tokenizer.decode(ids[span[0] : span[1]]) == wanted


@pytest.mark.parametrize("as_chat", [True, False], ids=["in the template", "plain"])
@pytest.mark.parametrize(
    ("row_format", "row", "asked"),
    [
        ("alpaca", {"instruction": "Name </s>", "input": "<s>", "output": "x</s>"}, alpaca_prompt("Name </s>", "<s>")),
        ("prompt_completion", {"prompt": "Name </s>", "completion": "x</s>"}, "Name </s>"),
    ],
)
def test_instructions_and_pairs(row_format, row, asked, as_chat):
    tokenizer = byte_tokenizer()
    template = choose_template(tokenizer).text if as_chat else None
    rules = {"format": row_format, "as_chat": as_chat, "template": template, "control_tokens": "text"}
    columns = encode(tokenizer, [row], **rules)
    (ids,), (span,) = columns["input_ids"], columns["spans"]
    assert special(tokenizer, ids) == ["<s>", "</s>"], "of the tokenizer, around a text that has the same"
    assert tokenizer.decode(ids[span[0] : span[1]]) == "x</s></s>", "an end in the text is text, and not the end"
    assert columns["answer"] == ["x</s>"]
    if not as_chat:
        assert tokenizer.decode(ids[: span[0]]) == f"<s>{asked}"


def test_documents_and_plain_prompts_hold_control_tokens_unless_those_are_text():
    tokenizer = byte_tokenizer()
    for row, row_format in (
        ({"text": "a</s>b"}, "text"),
        ({"prompt": "a</s>b", "completion": "c"}, "prompt_completion"),
    ):
        for choice, ends in (("refuse", 2), ("text", 1)):
            columns = encode(tokenizer, [row], format=row_format, control_tokens=choice)
            assert columns["input_ids"][0].count(tokenizer.eos_token_id) == ends
            assert columns["controls"] == [["</s>"]]
            assert tokenizer.decode(columns["input_ids"][0]).startswith("<s>a</s>b")


@pytest.mark.parametrize(
    ("row", "rules", "field"),
    [
        ({"prompt": "p", "completion": "a</s>b"}, {}, "completion"),
        ({"question": "p", "answer": "a</s>b"}, {"fields": {"prompt": "question", "completion": "answer"}}, "answer"),
        ({"prompt": "<s>", "completion": "a"}, {"as_chat": True}, "prompt"),
        ({"prompt": "p", "completion": "a</s>"}, {"as_chat": True}, "completion"),
        ({"instruction": "<s>", "output": "b"}, {"format": "alpaca"}, "instruction"),
        ({"instruction": "a", "input": "</s>", "output": "b"}, {"format": "alpaca"}, "input"),
        ({"instruction": "a", "output": "b", "system": "</s>"}, {"format": "alpaca", "as_chat": True}, "system"),
        ({"instruction": "a", "output": "b", "history": [["</s>", "c"]]}, {"format": "alpaca"}, "history"),
        ({"messages": [EXCHANGE[0], {**EXCHANGE[1], "content": "<s>"}]}, {"format": "messages"}, "messages[1].content"),
        ({"messages": [*EXCHANGE], "tools": [{"name": "<s>"}]}, {"format": "messages"}, "tools"),
        ({"sentence1": "a", "sentence2": "<s>", "label": 1}, {"format": "classification"}, "sentence2"),
    ],
)
def test_a_control_token_where_text_is_meant_makes_a_bad_row_with_its_field(row, rules, field):
    tokenizer = byte_tokenizer()
    template = choose_template(tokenizer).text
    columns = encode(tokenizer, [row], **{"format": "prompt_completion", "template": template, **rules})
    assert columns["status"] == [Status.BAD]
    assert re.match(
        rf"field '{re.escape(field)}' holds the control token '</?s>', which would be no", columns["note"][0]
    )


def prepare(tmp_path, tokenizer, train, evaluation=(), **settings):
    paths = {}
    for name, rows in (("train", train), ("eval", evaluation)):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"train": str(paths["train"]), "eval": str(paths["eval"]) if evaluation else None}
    return prepare_data(DataConfig(**{**found, "cache_dir": str(tmp_path / "cache"), **settings}), tokenizer)


def about(*tokens: str) -> dict:
    return {"messages": [{"role": "user", "content": " ".join(("first", *tokens))}, EXCHANGE[1]]}


def test_all_rows_with_control_tokens_are_counted_and_the_first_ones_named(tmp_path):
    train = [about(), *[about("<|im_end|>")] * 6, about("<|im_start|>", "<|im_end|>"), about()]
    with pytest.raises(ValueError, match="control tokens") as caught:
        prepare(tmp_path, byte_tokenizer("chatml"), train, [about("<|im_start|>"), about()])
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "train: control tokens stand in the texts of 7 of 9 rows ('<|im_end|>' in 7, '<|im_start|>' in 1):"
    )
    what = "holds the control token '<|im_end|>', which would be no text to the model but the start or the end of"
    assert lines[1:6] == [
        f"  {tmp_path}/train.jsonl, line {n}: field 'messages[0].content' {what} something" for n in range(2, 7)
    ]
    assert lines[6:8] == [
        "  and 2 more",
        "eval: control tokens stand in the texts of 1 of 2 rows ('<|im_start|>' in 1):",
    ]
    assert "set data.control_tokens to text to write these as plain text, or data.bad_rows to skip" in lines[-1]


def test_other_bad_rows_stop_the_preparation_first(tmp_path):
    with pytest.raises(ValueError, match=r"line 2: field 'messages' must be a list .*; fix it, or set data\.bad_rows"):
        prepare(tmp_path, byte_tokenizer("chatml"), [about("<|im_end|>"), {"messages": 3}])


def test_rows_with_control_tokens_are_skipped_or_kept_as_text_and_counted(tmp_path):
    train = [about(), about("<|im_end|>"), about("<|im_end|>", "<|im_start|>")]
    skipped = prepare(tmp_path, byte_tokenizer("chatml"), train, bad_rows="skip").train[0]
    assert (skipped.counts.bad, skipped.counts.examples, skipped.counts.controls_as_text) == (2, 1, {})
    assert (skipped.folder / LEFT_OUT).read_text().count("holds the control token") == 2
    kept = prepare(tmp_path, byte_tokenizer("chatml"), train, control_tokens="text").train[0]
    assert (kept.counts.bad, kept.counts.examples) == (0, 3)
    assert kept.counts.controls_as_text == {"<|im_end|>": 2, "<|im_start|>": 1}
    assert kept.folder != skipped.folder, "the cache tells them apart"
    (remark,) = kept.remarks()
    assert remark.startswith("train: control tokens that are plain text (rows that have them; a server would")
    assert remark.endswith(": <|im_end|> (2), <|im_start|> (1)")


def test_control_tokens_in_documents_are_counted(tmp_path):
    rows = [{"text": "a</s>b"}, {"text": "ab"}]
    (remark,) = prepare(tmp_path, byte_tokenizer(), rows).train[0].remarks()
    assert remark == (
        "train: control tokens in documents and plain prompts, which stay control tokens (rows that have them): "
        "</s> (1); data.control_tokens: text makes them text"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"system": "End by </s>"}, "data.system is 'End by </s>', with the control token '</s>', which would be no"),
        ({"prompt": "<s>{a}"}, "data.prompt is '<s>{a}', with the control token '<s>', which would be no text"),
        (
            {"prompt": "<s>{a}", "as_chat": False, "control_tokens": "text"},
            "data.prompt is '<s>{a}', with the control token '<s>', which data.control_tokens: text makes text: leave "
            "it out, or set data.control_tokens to refuse",
        ),
    ],
)
def test_control_tokens_in_texts_of_the_configuration_are_refused(tmp_path, settings, message):
    rows = [{"a": "x", "prompt": "p", "completion": "c"}]
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(tmp_path, byte_tokenizer(), rows, **{"as_chat": True, **settings})


def test_a_system_message_may_be_about_control_tokens(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}]
    settings = {"as_chat": True, "system": "End by </s>", "control_tokens": "text"}
    source = prepare(tmp_path, byte_tokenizer(), rows, **settings).train[0]
    tokenizer = byte_tokenizer()
    assert special(tokenizer, source.dataset[0]["input_ids"]) == ["<s>", "</s>"]
    assert tokenizer.decode(source.dataset[0]["input_ids"]).startswith("<s>End by </s>\n")


def test_what_a_tokenizer_cannot_write_as_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds the control token '</s>', which this tokenizer cannot write as plain"):
        prepare(tmp_path, tiny_tokenizer(), [{"text": "w1 </s> w2"}], control_tokens="text")
    named = chr(LAST_PRIVATE) * 13
    columns = encode(byte_tokenizer("chatml"), [{"text": f"a{named}b"}], format="text", control_tokens="text")
    assert columns["status"] == [Status.BAD], "that is how the writer knows <|endoftext|>"


def test_a_slow_tokenizer_cannot_tell_them_apart():
    with pytest.raises(ValueError, match=r"tokenizer SlowTokenizer cannot tell control tokens .*: set it to refuse"):
        control_tokens(SlowTokenizer(), "text")


def test_a_tokenizer_that_makes_control_tokens_of_their_letters_cannot_tell_them_apart():
    model = models.BPE(vocab={"<": 0, "s>": 1, "<s>": 2, "</s>": 3, "s": 4, ">": 5}, merges=[("s", ">"), ("<", "s>")])
    with pytest.raises(ValueError, match=r"control_tokens is text, but the tokenizer .*<s>.*: set it to refuse"):
        control_tokens(fast(Tokenizer(model)), "text")


def test_a_tokenizer_that_loses_private_characters_cannot_tell_them_apart():
    with pytest.raises(ValueError, match=r"'\[CLS\]' has no name of its own"):
        control_tokens(word_pieces(normalized=True), "text")


def test_other_tasks_write_them_as_text_too():
    tokenizer = word_pieces()
    row = {"sentence1": "a </s> b", "sentence2": "<s>", "label": "x"}
    rules = {"format": "classification", "control_tokens": "text", "max_length": 40}
    (ids,) = encode(tokenizer, [row], **rules)["input_ids"]
    assert special(tokenizer, ids) == ["<s>"], "what the tokenizer puts around"
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<s>", "a", "<", "/", "s", ">", "b", "<", "s", ">"]
    question = {"question": "a </s>", "context": "b </s> c", "answers": {"text": ["</s>"], "answer_start": [2]}}
    columns = encode(tokenizer, [question], format="squad", control_tokens="text", max_length=40, stride=2)
    assert special(tokenizer, columns["input_ids"][0]) == ["<s>"]
    found = columns["input_ids"][0][columns["start"][0] : columns["end"][0] + 1]
    assert tokenizer.convert_ids_to_tokens(found) == ["<", "/", "s", ">"]


def test_what_is_cut_is_counted_in_the_same_tokens():
    tokenizer = byte_tokenizer()
    row = {"prompt": "</s>" * 10, "completion": "c"}
    rules = {"format": "prompt_completion", "overlong": "truncate", "max_length": 20}
    (ids,) = encode(tokenizer, [row], **rules, control_tokens="text")["input_ids"]
    assert len(ids) == 20
    assert special(tokenizer, ids) == ["<s>", "</s>"]
