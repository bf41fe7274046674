import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_tokenizer import word_tokenizer

from dora_dist.data.cache import prepare_source
from dora_dist.data.encoding.encoder import EncodingRules
from dora_dist.data.prepared import LEFT_OUT, PreparedSource
from dora_dist.data.reading.files import locate

DOCUMENT, SUMMARY = "Ann has a red ball and runs .", "Ann runs ."
LONG = {"document": " ".join(["Ann"] * 20), "summary": SUMMARY}
WORDY = {"document": DOCUMENT, "summary": " ".join(["runs"] * 20)}


def tokenizer(template: str = "<s> $A </s>", **special: str | None) -> Any:
    return word_tokenizer(DOCUMENT, template, **special)


def prepare(folder: Path, rows: list[dict], tokens: Any = None, **rules: Any) -> PreparedSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = EncodingRules(format="summary", **{"max_length": 12, "max_target_length": 8, **rules})
    return prepare_source("src", locate(str(path)), rules, tokens or tokenizer(), folder / "cache", 1)


def test_a_document_is_the_input_and_its_summary_are_the_labels(tmp_path):
    source = prepare(tmp_path, [{"document": f" {DOCUMENT}\n", "summary": f"{SUMMARY}\n"}])
    (row,) = source.dataset
    assert tokenizer().decode(row["input_ids"]) == f"<s> {DOCUMENT} </s>"
    assert tokenizer().decode(row["labels"]) == f"<s> {SUMMARY} </s>"
    assert row["answer"] == SUMMARY
    assert row["removed"] == 0


def test_both_lose_their_ends_where_they_are_too_long_but_not_the_token_that_ends_them(tmp_path):
    source = prepare(tmp_path, [LONG, WORDY], overlong="truncate")
    long, wordy = source.dataset
    assert tokenizer().decode(long["input_ids"]) == f"<s> {' '.join(['Ann'] * 10)} </s>"
    assert tokenizer().decode(long["labels"]) == f"<s> {SUMMARY} </s>"
    assert tokenizer().decode(wordy["labels"]) == f"<s> {' '.join(['runs'] * 6)} </s>"
    assert wordy["answer"] == WORDY["summary"]
    assert (long["removed"], wordy["removed"]) == (10, 14)
    assert (source.counts.truncated, source.counts.removed_tokens) == (2, 24)


def test_what_does_not_fit_may_be_left_out_and_is_listed_with_the_text_it_is_about(tmp_path):
    source = prepare(tmp_path, [LONG, WORDY, {"document": DOCUMENT, "summary": SUMMARY}], overlong="drop")
    assert (source.counts.overlong, source.counts.examples) == (2, 1)
    reasons = [json.loads(line)["reason"] for line in (source.folder / LEFT_OUT).read_text().splitlines()]
    assert reasons == [
        "the document has 22 tokens, more than data.max_length 12",
        "the summary has 22 tokens, more than data.max_target_length 8",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (LONG, r"rows\.jsonl, line 1: the document has 22 tokens, more than data\.max_length 12: raise it"),
        (WORDY, r"rows\.jsonl, line 1: the summary has 22 tokens, more than data\.max_target_length 8: raise it"),
        ({**LONG, "document": "Ann </s> runs"}, r"field 'document' holds the control token '</s>'"),
        ({**LONG, "summary": "Ann </s> runs"}, r"field 'summary' holds the control token '</s>'"),
        ({**LONG, "summary": " "}, r"field 'summary' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_stops_the_preparation(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, [row])


def test_the_summary_is_part_of_an_examples_key(tmp_path):
    rows = [{"document": DOCUMENT, "summary": summary} for summary in (SUMMARY, DOCUMENT, SUMMARY)]
    first, second, third = prepare(tmp_path, rows, max_target_length=12).keys()
    assert first == third != second


@pytest.mark.parametrize(
    ("tokens", "rules", "message"),
    [
        (tokenizer("<s> $A"), {}, r"does not end a summary with an end token .*where to stop"),
        (tokenizer(eos_token=None), {}, r"does not end a summary with an end token"),
        (tokenizer(), {"max_length": 2}, r"data\.max_length is 2, but the tokenizer alone puts 2 tokens"),
        (tokenizer(), {"max_target_length": 2}, r"data\.max_target_length is 2, but the tokenizer alone puts 2"),
    ],
)
def test_what_cannot_work_is_refused_at_once(tmp_path, tokens, rules, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, [LONG], tokens, **rules)
