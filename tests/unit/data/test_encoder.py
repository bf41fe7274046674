import json

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.tiny_tokenizer import word_tokenizer

from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.encoder import IGNORED, EncodingRules
from dora_dist.data.encoding.text import encode_prompts, labels_of
from dora_dist.data.reading.samples import alpaca_prompt
from dora_dist.data.row_formats import build_encoder

TEXT = "one two three four five"


def encode(tokenizer, rows, **rules):
    rules = {"format": "prompt_completion", "max_length": 100, **rules}
    encoder = build_encoder(tokenizer, EncodingRules(**rules))
    return encoder(
        {
            "place": [f"row {number}" for number in range(1, len(rows) + 1)],
            "json": [json.dumps(row) for row in rows],
            "flaw": [""] * len(rows),
            "filled": [False] * len(rows),
        }
    )


def trained(tokenizer, columns, number=0):
    ids, spans = columns["input_ids"][number], columns["spans"][number]
    return tokenizer.decode([label for label in labels_of(ids, spans) if label != IGNORED])


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A"], ids=["bos", "bos and eos", "neither"])
def test_a_pair_is_prompt_completion_and_end_and_the_loss_is_on_the_latter_two(template):
    tokenizer = word_tokenizer(TEXT, template)
    columns = encode(tokenizer, [{"prompt": "one two", "completion": "three"}])
    start = ["<s>"] if template.startswith("<s>") else []
    assert tokenizer.convert_ids_to_tokens(columns["input_ids"][0]) == [*start, "one", "two", "three", "</s>"]
    assert trained(tokenizer, columns) == "three </s>"
    (prompt,) = encode_prompts(tokenizer, ["one two"])
    assert columns["input_ids"][0][: columns["answer_start"][0]] == prompt


def test_an_end_that_the_completion_has_already_is_not_doubled():
    tokenizer = byte_tokenizer()
    columns = encode(tokenizer, [{"prompt": "p", "completion": "c</s>"}])
    assert tokenizer.decode(columns["input_ids"][0]) == "<s>pc</s>"
    assert columns["answer"] == ["c"], "a generated answer is decoded without it"


@pytest.mark.parametrize("family", ["mistral", "llama3", "gemma"])
def test_a_start_that_a_text_has_already_is_not_doubled(family):
    tokenizer = byte_tokenizer(family)
    start = tokenizer.bos_token
    pairs = [{"prompt": f"{start}ask", "completion": "c"}, {"prompt": "ask", "completion": "c"}]
    assert len(set(map(tuple, encode(tokenizer, pairs)["input_ids"]))) == 1
    documents = encode(tokenizer, [{"text": f"{start}abc"}, {"text": "abc"}], format="text")["input_ids"]
    assert documents[0] == documents[1]
    assert encode_prompts(tokenizer, [f"{start}ask", f"a{start}"]) == [
        tokenizer(f"{start}ask", add_special_tokens=False)["input_ids"],
        tokenizer(f"{start}a{start}", add_special_tokens=False)["input_ids"],
    ]


def test_a_start_that_is_plain_text_comes_after_that_of_the_tokenizer():
    tokenizer = byte_tokenizer()
    (ids,) = encode(tokenizer, [{"text": "<s>abc"}], format="text", control_tokens="text")["input_ids"]
    assert tokenizer.decode(ids) == "<s><s>abc</s>"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_starts_of_a_text_are_kept_where_the_tokenizer_adds_none():
    tokenizer = word_tokenizer(TEXT, "$A")
    assert encode_prompts(tokenizer, ["<s> <s> one"]) == [tokenizer.convert_tokens_to_ids(["<s>", "<s>", "one"])]


def test_an_instruction_stands_under_headings_or_in_the_chat_template():
    tokenizer = byte_tokenizer("llama3")
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    columns = encode(tokenizer, [row], format="alpaca")
    assert tokenizer.decode(columns["input_ids"][0]) == (
        f"<|begin_of_text|>{alpaca_prompt('Add.', '1 2')}3<|end_of_text|>"
    )
    assert trained(tokenizer, columns) == "3<|end_of_text|>"
    template = choose_template(tokenizer).text
    columns = encode(tokenizer, [row], format="alpaca", as_chat=True, template=template, max_length=200)
    assert "user<|end_header_id|>\n\nAdd.\n\n1 2<|eot_id|>" in tokenizer.decode(columns["input_ids"][0])
    assert trained(tokenizer, columns) == "3<|eot_id|>"


def test_a_document_is_trained_from_its_second_token_to_its_end():
    tokenizer = byte_tokenizer()
    columns = encode(tokenizer, [{"text": "abc"}], format="text")
    assert tokenizer.decode(columns["input_ids"][0]) == "<s>abc</s>"
    assert trained(tokenizer, columns) == "abc</s>"


def test_fields_may_have_other_names():
    tokenizer = byte_tokenizer()
    fields = {"prompt": "question", "completion": "answer"}
    columns = encode(tokenizer, [{"question": "q", "answer": "a", "prompt": "not this"}], fields=fields)
    assert tokenizer.decode(columns["input_ids"][0]) == "<s>qa</s>"


@pytest.mark.parametrize("answer", ["</s>", " \n", " </s> "])
def test_an_answer_of_nothing_but_its_end_is_refused(answer):
    with pytest.raises(ValueError, match=r"row 1: field 'completion' is (empty|nothing but the end token)"):
        encode(byte_tokenizer(), [{"prompt": "p", "completion": answer}])


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        build_encoder(word_tokenizer(TEXT, eos_token=None), EncodingRules(format="text"))


def test_the_batch_size_changes_nothing():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "p" * n, "completion": "c" * (9 - n)} for n in range(1, 9)]
    whole = encode(tokenizer, rows)
    parts = [encode(tokenizer, [row]) for row in rows]
    for name in ("input_ids", "spans", "key"):
        assert whole[name] == [part[name][0] for part in parts]


LONG = "abcdefghijklmnopqrstuvwxyz"
CHAT = [
    {"role": role, "content": content}
    for role, content in [("system", "S"), ("user", LONG), ("assistant", "one"), ("user", "q2"), ("assistant", "two")]
]


@pytest.mark.parametrize(
    ("rules", "row", "most", "kept"),
    [
        ({}, {"prompt": LONG, "completion": "answer"}, 18, "<s>abcdevwxyzanswer</s>"),
        (
            {"format": "alpaca"},
            {"instruction": "Do", "input": LONG, "output": "answer"},
            65,
            "<s>### Instruction:\nDo\n\n### Input:\nabcdvwxyz\n\n### Response:\nanswer</s>",
        ),
        ({"format": "text"}, {"text": LONG}, 5, "<s>abcd"),
        (
            {"format": "messages"},
            {"messages": CHAT},
            45,
            "<s>S\n\n### Instruction:\nq2\n\n### Response:\ntwo</s>\n",
        ),
        (
            {"format": "messages"},
            {"messages": CHAT[:3]},
            46,
            "<s>S\n\n### Instruction:\nabyz\n\n### Response:\none</s>\n",
        ),
    ],
    ids=["pair", "instruction", "document", "oldest exchange", "longest message"],
)
def test_truncation_keeps_the_answer(rules, row, most, kept):
    tokenizer = byte_tokenizer()
    template = choose_template(tokenizer).text if rules.get("format") == "messages" else None
    columns = encode(tokenizer, [row], **rules, template=template, max_length=most, overlong="truncate")
    assert tokenizer.decode(columns["input_ids"][0]) == kept
    assert len(columns["input_ids"][0]) <= most
    whole = encode(tokenizer, [row], **rules, template=template, max_length=1000)
    assert columns["removed"] == [len(whole["input_ids"][0]) - len(columns["input_ids"][0])]


def test_an_answer_that_does_not_fit_alone_is_left_out_and_said():
    columns = encode(byte_tokenizer(), [{"prompt": "p", "completion": LONG}], max_length=20, overlong="truncate")
    assert columns["input_ids"] == [[]]
    assert "29 tokens, more than data.max_length 20, and the answer alone is too long" in columns["note"][0]


def test_an_overlong_row_stops_the_run_or_is_left_out():
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": LONG}]
    with pytest.raises(ValueError, match=r"row 2 has 29 tokens, more than data\.max_length 20: .*drop or truncate"):
        encode(byte_tokenizer(), rows, max_length=20)
    columns = encode(byte_tokenizer(), rows, max_length=20, overlong="drop")
    assert [len(ids) for ids in columns["input_ids"]] == [4, 0]


def test_truncation_ends_where_a_character_is_several_tokens():
    tokenizer = byte_tokenizer()
    for most in range(20, 60):
        row = {"prompt": "語" * 40, "completion": "答え"}
        columns = encode(tokenizer, [row], max_length=most, overlong="truncate")
        text = tokenizer.decode(columns["input_ids"][0])
        assert text == f"<s>{'語' * text.count('語')}答え</s>"
        assert most - 6 < len(columns["input_ids"][0]) <= most


def test_truncation_ends_where_a_text_cannot_become_shorter(tmp_path):
    """Byte fallback behind a prefix of its own: the last character is more tokens than any cut leaves."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a"])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    for most in range(5, 30):
        for text in ("語", "語語語語語語", "a語" * 9):
            row = {"prompt": text, "completion": "a"}
            columns = encode(fast, [row], max_length=most, overlong="truncate")
            assert len(columns["input_ids"][0]) <= most
            assert not columns["input_ids"][0] or trained(fast, columns).endswith("a</s>")
