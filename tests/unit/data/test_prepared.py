import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.repository import REPOSITORY
from support.tiny_run import tiny_tokenizer
from support.tiny_tokenizer import word_tokenizer

from dora_dist.config.data import DataConfig
from dora_dist.data import cache
from dora_dist.data.cache import MANIFEST, prepare_source, tokenizer_digest
from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.encoder import EncodingRules
from dora_dist.data.encoding.text import TextEncoder
from dora_dist.data.prepared import LEFT_OUT, PreparedSource
from dora_dist.data.reading.files import locate
from dora_dist.setup.run_data import RunData, build_mixture, prepare_data

PATIENCE_SECONDS = 60


def words(first: int, count: int) -> str:
    return " ".join(f"w{first + number}" for number in range(count))


ALPACA = {"instruction": "w1", "input": "w2", "output": "w3"}
PAIR = {"prompt": "w1 w2", "completion": "w3"}
TEXT = {"text": "w1 w2 w3"}
QUESTION, ANSWER = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}
MESSAGES = {"messages": [QUESTION, ANSWER]}
SHAREGPT = {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]}
GOOD = {"alpaca": ALPACA, "prompt_completion": PAIR, "text": TEXT, "messages": MESSAGES, "sharegpt": SHAREGPT}


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Lines of JSON; what is bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def prepare(path: Path, row_format: str, tokenizer: Any = None, workers: int = 1, **rules: Any) -> PreparedSource:
    tokenizer = tokenizer or tiny_tokenizer()
    if row_format in ("messages", "sharegpt"):
        rules = {"template": choose_template(tokenizer).text, **rules}
    cache = path.parent / "cache"
    location = locate(str(path))
    return prepare_source("src", location, EncodingRules(format=row_format, **rules), tokenizer, cache, workers)


def left_out(source: PreparedSource) -> list[dict]:
    return [json.loads(line) for line in (source.folder / LEFT_OUT).read_text("utf-8").splitlines()]


def decoded(source: PreparedSource, number: int = 0) -> str:
    return tiny_tokenizer().decode(source.dataset[number]["input_ids"])


def answers(source: PreparedSource, tokenizer: Any = None) -> list[str]:
    """The trained part of every example."""
    tokenizer = tokenizer or tiny_tokenizer()
    spans = [list(zip(row["spans"][::2], row["spans"][1::2], strict=True)) for row in source.dataset]
    return [
        " | ".join(tokenizer.decode(row["input_ids"][start:end]) for start, end in edges)
        for row, edges in zip(source.dataset, spans, strict=True)
    ]


FLAWS = [
    ("alpaca", {"instruction": "w1"}, "field 'output' is missing"),
    ("alpaca", {**ALPACA, "input": 7}, "field 'input' must be text, got 7"),
    ("alpaca", {**ALPACA, "output": ""}, "field 'output' is empty"),
    ("prompt_completion", {"completion": "w3"}, "field 'prompt' is missing"),
    ("prompt_completion", {**PAIR, "completion": 1e5}, "field 'completion' must be text, got 100000.0"),
    ("text", {"text": " "}, "field 'text' is empty"),
    ("messages", {"messages": [QUESTION]}, "field 'messages' has no message of the assistant"),
    ("messages", {"messages": [{**QUESTION, "role": "bot"}, ANSWER]}, "field 'messages[0].role' must be one of"),
    ("messages", {"messages": [QUESTION, {**ANSWER, "content": ""}]}, "field 'messages[1].content' is empty"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "w1"}]}, "field 'conversations[0].from' must be one of"),
    ("text", b'{"text": "w1"', "the row cannot be read as JSON: Expecting ',' delimiter"),
    ("text", b'{"text": "w1 \xff"}', "the row is not UTF-8"),
    ("text", ["w1"], 'the row must be an object with named fields, got ["w1"]'),
    ("text", b"NaN", "the row must be an object with named fields, got NaN"),
]
FLAW_NAMES = [f"{name}: {flaw}" for name, _, flaw in FLAWS]


@pytest.mark.parametrize(("row_format", "row", "flaw"), FLAWS, ids=FLAW_NAMES)
def test_a_row_that_cannot_be_used_stops_with_file_row_and_field(tmp_path, row_format, row, flaw):
    path = write(tmp_path / "rows.jsonl", [GOOD[row_format], row, GOOD[row_format]])
    with pytest.raises(ValueError, match=r"; fix it, or set data\.bad_rows to skip$") as caught:
        prepare(path, row_format)
    assert str(caught.value).startswith(f"{path}, line 2: {flaw}")
    assert list((tmp_path / "cache").glob("src-*/*")) == []


@pytest.mark.parametrize(("row_format", "row", "flaw"), FLAWS, ids=FLAW_NAMES)
def test_a_skipped_row_is_counted_and_listed(tmp_path, row_format, row, flaw):
    path = write(tmp_path / "rows.jsonl", [GOOD[row_format], row, GOOD[row_format]])
    source = prepare(path, row_format, bad_rows="skip")
    assert (source.counts.rows, source.counts.bad, source.counts.examples) == (3, 1, 2)
    assert source.dataset["place"][:] == [f"{path}, line 1", f"{path}, line 3"]
    (line,) = left_out(source)
    assert (line["place"], line["why"]) == (f"{path}, line 2", "bad")
    assert line["reason"].startswith(flaw)
    assert source.counts.remarks() == ["skipped 1 of 3 rows that cannot be used"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json", "saved"])
def test_a_row_of_any_kind_of_file_is_named(tmp_path, name):
    rows, path = [PAIR, {**PAIR, "completion": " "}], tmp_path / name
    save(rows, path)
    with pytest.raises(ValueError, match=rf"^{path}, row 2: field 'completion' is empty"):
        prepare(path, "prompt_completion")
    assert left_out(prepare(path, "prompt_completion", bad_rows="skip"))[0]["place"] == f"{path}, row 2"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "w1"}, b"no json"],
            r"none of 2 rows can be used; the first: .*, line 1: field 'completion' is mis",
        ),
        (
            [b"no json", {"prompt": "w1"}],
            r"none of 2 rows can be used; the first: .*, line 1: the row cannot be re",
        ),
        (
            [{"prompt": words(0, 50), "completion": "w1"}],
            r"none of 1 rows can be used; the first: .*, line 1: 52 tokens",
        ),
    ],
)
def test_a_source_that_leaves_nothing_is_refused_with_the_first_reason(tmp_path, rows, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"^src: {message}"):
        prepare(path, "prompt_completion", bad_rows="skip", overlong="drop", max_length=20)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
@pytest.mark.parametrize("row_format", ["auto", "text"])
def test_a_source_without_rows_is_refused(tmp_path, row_format, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"rows(\.jsonl)? has no rows$"):
        prepare_run(tmp_path, tmp_path / "rows.jsonl", format=row_format)


@pytest.mark.parametrize("row", [{"prompt": "w1 \ud800", "completion": "w2"}, {**PAIR, "completion": "w2 \udfff"}])
def test_half_a_surrogate_pair_is_no_text(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", [PAIR, row])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        prepare(path, "prompt_completion")
    assert prepare(path, "prompt_completion", bad_rows="skip").counts.bad == 1


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 200_000], ids=["a very long number", "very deep"])
def test_json_that_python_does_not_take_is_a_bad_row(tmp_path, value):
    path = write(tmp_path / "rows.jsonl", [PAIR, f'{{"prompt": "w1", "completion": "w2", "x": {value}}}'.encode()])
    assert prepare(path, "prompt_completion", bad_rows="skip").counts.bad == 1


TWICE = [
    ('{"prompt": "w1", "completion": "w2", "completion": "w3"}', "prompt_completion", "completion"),
    ('{"prompt": "w1", "completion": "w2", "completion": "w2"}', "prompt_completion", "completion"),
    ('{"prompt": "w1", "completion": "w2", "meta": [{"id": 1, "id": 2}]}', "prompt_completion", "id"),
    ('{"messages": [{"role": "user", "content": "w1", "role": "assistant"}]}', "messages", "role"),
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(("row", "row_format", "key"), TWICE, ids=["row", "equal values", "inside", "message"])
def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path, row, row_format, key, name):
    """The last of its values would be read."""
    rows = [json.dumps(GOOD[row_format]), row]
    path, place = tmp_path / name, "line" if name.endswith("jsonl") else "row"
    path.write_text("\n".join(rows) if place == "line" else f"[{', '.join(rows)}]")
    said = rf"{name}, {place} 2: the row cannot be read as JSON: the key {key!r} stands twice in one object, and one of"
    with pytest.raises(ValueError, match=said):
        prepare(path, row_format)
    assert prepare(path, row_format, bad_rows="skip").counts.bad == 1


def test_a_key_that_stands_twice_holds_no_row_out(tmp_path):
    rows = [{**PAIR, "prompt": words(n % 8, n // 8 + 1)} for n in range(24)]
    path = write(tmp_path / "rows.jsonl", [*rows, *[TWICE[0][0].encode()] * 9])
    data = prepare_run(tmp_path, path, bad_rows="skip", eval="40%")
    assert [source.counts.bad for source in (*data.train, *data.evaluation)] == [9, 0]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_column_that_stands_twice_is_refused(tmp_path, name):
    names = ["prompt", "completion", "completion"]
    content = pa.Table.from_arrays([pa.array([text]) for text in ("w1", "w2", "w3")], names=names)
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(content, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, content.schema) as writer:
            writer.write_table(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: ValueError: the key 'completion' stands twice"):
        prepare(path, "prompt_completion")


def prepare_run(folder: Path, train: Any, tokenizer: Any = None, **settings: Any) -> RunData:
    def spelled(given: Any) -> Any:
        return str(given) if isinstance(given, Path) else given

    if "eval" in settings:
        settings["eval"] = spelled(settings["eval"])
    config = DataConfig(train=spelled(train), cache_dir=str(folder / "cache"), **{"workers": 1, **settings})
    return prepare_data(config, tokenizer or tiny_tokenizer())


@pytest.mark.parametrize("row_format", GOOD)
def test_every_format_is_told_by_itself(tmp_path, row_format):
    data = prepare_run(tmp_path, write(tmp_path / "rows.jsonl", [GOOD[row_format]] * 2))
    (source,) = data.train
    assert source.format == row_format
    assert (data.template is not None) == (row_format in ("messages", "sharegpt"))
    assert answers(source) == ["w1 w2 w3 </s>" if row_format == "text" else "w3 </s>"] * 2


def test_a_named_format_wins_over_what_the_fields_look_like(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ALPACA, **PAIR, "input": "", "completion": "w9"}])
    assert answers(prepare_run(tmp_path, path).train[0]) == ["w3 </s>"]
    assert answers(prepare_run(tmp_path, path, format="prompt_completion").train[0]) == ["w9 </s>"]
    own = {"path": str(path), "format": "prompt_completion"}
    assert answers(prepare_run(tmp_path, [own], format="alpaca").train[0]) == ["w9 </s>"]


def test_a_missing_field_in_one_of_the_first_rows_is_that_rows_flaw(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ALPACA, {"instruction": "w1"}, ALPACA])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: field 'output' is missing"):
        prepare_run(tmp_path, path)
    assert prepare_run(tmp_path, path, bad_rows="skip").train[0].counts.bad == 1


NAMED = {"instruction": "question", "output": "response"}
ORCA = {"question": "w1", "response": "w3"}


@pytest.mark.parametrize("share", [{}, {"eval": "20%"}], ids=["all", "a share held out"])
def test_a_name_that_no_row_has_is_refused_for_a_field_that_rows_may_lack(tmp_path, share):
    """All rows would be trained without it."""
    path = write(tmp_path / "rows.jsonl", [{**ORCA, "system_text": words(n, 2)} for n in range(9)])
    message = (
        r"^the fields of rows say that system is 'sytem_text', which none of its rows has; did you mean system_text\? "
        r"\(they have question, response, system_text\): correct the name, or leave system out of the fields$"
    )
    with pytest.raises(ValueError, match=message):
        prepare_run(tmp_path, {"path": str(path), "fields": {**NAMED, "system": "sytem_text"}}, **share)
    with pytest.raises(ValueError, match=r"input is 'system_text\.x', which none of its rows has"):
        prepare_run(tmp_path, {"path": str(path), "fields": {**NAMED, "input": "system_text.x"}}, **share)


@pytest.mark.parametrize("empty", [{}, {"system_text": None}, {"system_text": ""}])
def test_a_name_that_some_rows_have_is_read_where_it_is(tmp_path, empty):
    """More rows lack it than the format is told from, and some cannot be read."""
    rows = [*[{**ORCA, **empty}] * 30, b"{no json", ["w1"], {**ORCA, "system_text": "w9"}]
    source = {"path": str(write(tmp_path / "rows.jsonl", rows)), "fields": {**NAMED, "system": "system_text"}}
    (prepared,) = prepare_run(tmp_path, source, as_chat=True, bad_rows="skip").train
    assert (prepared.counts.bad, prepared.counts.examples) == (2, 31)
    assert ["w9" in decoded(prepared, number) for number in (0, 30)] == [False, True]


@pytest.mark.parametrize("share", [{}, {"eval": "20%"}], ids=["all", "a share held out"])
def test_a_field_is_ignored_that_rows_have_and_that_is_not_read(tmp_path, share):
    rows = [{**PAIR, "prompt": words(n, 2), "context": f"w{n}", "weight": n} for n in range(40)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"'context' is not read .* set ignore: \[context\] for the source"):
        prepare_run(tmp_path, str(path))
    data = prepare_run(tmp_path, {"path": str(path), "ignore": ["context", "weight"]}, **share)
    found = [*data.train, *data.evaluation]
    assert (sum(source.counts.rows for source in found), data.remarks()[:1]) == (40, data.notes[:1])
    assert len(found) == 1 + bool(share)
    for name, message in (
        ("contxt", r"the ignore of rows names 'contxt', which none of its rows has; did you mean context\?"),
        ("meta.x", r"the ignore of rows names 'meta\.x', which none of its rows has \(they have completion, context"),
        ("prompt", r"the ignore of rows names 'prompt', which is read in rows of the format prompt_completion"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_run(tmp_path, {"path": str(path), "ignore": ["context", "weight", name]}, **share)
    path = write(tmp_path / "paths.jsonl", [{"prompt": "w1", "a": {"text": ["w3"]}}] * 2)
    with pytest.raises(ValueError, match=r"names 'a', which is read in rows of the format prompt_completion"):
        prepare_run(tmp_path, {"path": str(path), "fields": {"completion": "a.text.0"}, "ignore": ["a"]}, **share)


def test_names_are_looked_for_before_a_source_is_prepared_and_not_again(tmp_path, monkeypatch):
    rows = [*[ORCA] * 30, {**ORCA, "system_text": "w9"}]
    source = {"path": str(write(tmp_path / "rows.jsonl", rows)), "fields": {**NAMED, "system": "system_text"}}
    asked = []
    monkeypatch.setattr(cache, "_check_names", lambda name, location, rules: asked.append(name))
    for _ in range(2):
        prepare_run(tmp_path, source, as_chat=True)
    assert asked == ["rows"]


def save(rows: list[dict], path: Path) -> None:
    if path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(str(path), index=False)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json", "saved"])
def test_the_same_rows_give_the_same_examples_from_every_kind_of_file(tmp_path, name):
    texts = ["w1, w2", 'w3 "w4"', "w5\nw6", "2024-01-01", "NA", "007", "w7\r\nw8"]
    rows = [{"instruction": f"w{n} w{n}", "input": text, "output": text} for n, text in enumerate(texts)]
    tokenizer = word_tokenizer(" ".join(texts) + words(0, 9))
    expected = prepare(write(tmp_path / "rows.jsonl", rows), "alpaca", tokenizer)
    save(rows, tmp_path / name)
    source = prepare(tmp_path / name, "alpaca", tokenizer)
    assert source.digest == expected.digest
    assert source.dataset["input_ids"][:] == expected.dataset["input_ids"][:]
    assert source.dataset["answer"][:] == expected.dataset["answer"][:]
    assert source.counts == expected.counts


# Prompt of 10 words, answer of 3 with its end.
OVERLONG = {"prompt": words(10, 10), "completion": "w1 w2"}


def test_an_overlong_row_stops_with_file_row_and_length(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR, OVERLONG])
    with pytest.raises(
        ValueError, match=rf"^{path}, line 2 has 13 tokens, more than data\.max_length 12: raise it, or"
    ):
        prepare(path, "prompt_completion", max_length=12)
    assert prepare(path, "prompt_completion", max_length=13).counts.examples == 2


def test_overlong_rows_are_dropped_counted_and_listed(tmp_path):
    path = write(tmp_path / "rows.jsonl", [OVERLONG, PAIR, OVERLONG])
    source = prepare(path, "prompt_completion", max_length=12, overlong="drop")
    assert (source.counts.rows, source.counts.overlong, source.counts.examples) == (3, 2, 1)
    assert source.dataset["place"][:] == [f"{path}, line 2"]
    note = "13 tokens, more than data.max_length 12"
    assert left_out(source) == [{"place": f"{path}, line {n}", "why": "overlong", "reason": note} for n in (1, 3)]
    assert source.counts.remarks() == ["dropped 2 examples that do not fit into data.max_length"]
    assert (source.counts.tokens, source.counts.trained_tokens) == (4, 2)


@pytest.mark.parametrize("most", [12, 8, 5])
@pytest.mark.parametrize(
    ("row_format", "row", "given"),
    [
        ("prompt_completion", OVERLONG, 10),
        ("alpaca", {"instruction": words(10, 10), "output": "w1 w2"}, 14),
        ("alpaca", {"instruction": "w9", "input": words(10, 10), "output": "w1 w2"}, 17),
    ],
    ids=["pair", "instruction", "instruction with input"],
)
def test_truncation_keeps_the_answer_whole_and_counts_what_it_cut(tmp_path, row_format, row, given, most):
    path = write(tmp_path / "rows.jsonl", [row])
    assert prepare(path, row_format).counts.tokens == given + 3
    most += given - 10
    source = prepare(path, row_format, max_length=most, overlong="truncate")
    (row,) = source.dataset
    assert most - 1 <= len(row["input_ids"]) <= most
    assert answers(source) == ["w1 w2 </s>"]
    assert row["removed"] == source.counts.removed_tokens == given + 3 - len(row["input_ids"])
    assert (source.counts.truncated, source.counts.overlong, source.counts.examples) == (1, 0, 1)
    assert source.counts.remarks() == [f"truncated 1 examples by {row['removed']} tokens in all"]


@pytest.mark.parametrize(("most", "first", "last"), [(12, 4, 5), (8, 2, 3), (5, 1, 1)])
def test_truncation_cuts_the_middle_and_makes_no_word_that_was_not_there(tmp_path, most, first, last):
    path = write(tmp_path / "rows.jsonl", [OVERLONG])
    source = prepare(path, "prompt_completion", max_length=most, overlong="truncate")
    assert decoded(source).split() == [*words(10, first).split(), *words(20 - last, last).split(), "w1", "w2", "</s>"]


@pytest.mark.parametrize("num_answer_words", [11, 12, 30])
def test_an_answer_that_is_too_long_alone_is_dropped_and_counted(tmp_path, num_answer_words):
    row = {"prompt": words(10, 5), "completion": words(1, num_answer_words)}
    source = prepare(
        write(tmp_path / "rows.jsonl", [PAIR, row]), "prompt_completion", max_length=12, overlong="truncate"
    )
    assert (source.counts.overlong, source.counts.truncated, source.counts.examples) == (1, 0, 1)
    assert left_out(source)[0]["reason"].endswith("more than data.max_length 12, and the answer alone is too long")


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        ("alpaca", {"instruction": words(0, 20), "input": words(0, 25), "output": "w1 w2"}),
        (
            "messages",
            {"messages": [{"role": "system", "content": words(0, 20)}, {**QUESTION, "content": words(0, 25)}, ANSWER]},
        ),
    ],
)
def test_truncation_cuts_several_texts_where_one_is_not_enough(tmp_path, row_format, row):
    path = write(tmp_path / "rows.jsonl", [row, GOOD[row_format]])
    source = prepare(path, row_format, max_length=22, overlong="truncate")
    assert (source.counts.truncated, source.counts.overlong) == (1, 0)


@pytest.mark.timeout(3, method="signal")
@pytest.mark.parametrize(
    "prompt",
    ["a" * 30 + "é" * 10, "😀" * 8, "日本" * 10, "😀a" * 8],
    ids=["two bytes", "four bytes", "three bytes", "four bytes and one"],
)
def test_truncation_of_characters_of_several_tokens_ends_and_doubles_none(tmp_path, prompt):
    path, tokenizer = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": "ok"}]), byte_tokenizer()
    source = prepare(path, "prompt_completion", tokenizer, max_length=20, overlong="truncate")
    text = tokenizer.decode(source.dataset[0]["input_ids"], skip_special_tokens=True).removesuffix("ok")
    assert 0 < len(text) < len(prompt)
    halves = [(text[:n], text[n:]) for n in range(len(text) + 1)]
    assert any(prompt.startswith(first) and prompt.endswith(last) for first, last in halves)


def test_a_document_loses_its_end(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": words(0, 10)}, TEXT])
    source = prepare(path, "text", max_length=6, overlong="truncate")
    assert decoded(source).split() == words(0, 6).split()
    assert (source.counts.truncated, source.counts.removed_tokens) == (1, 5)


def exchange(first: int) -> list[dict]:
    return [{"role": "user", "content": words(first, 3)}, {"role": "assistant", "content": words(first + 3, 2)}]


@pytest.mark.parametrize(("num_lost", "room"), [(0, 0), (1, 1), (2, 11)])
def test_a_conversation_loses_its_oldest_exchanges_and_keeps_the_system_text(tmp_path, num_lost, room):
    system = [{"role": "system", "content": "w0"}]
    exchanges = [exchange(1), exchange(6), exchange(11)]
    path = write(tmp_path / "rows.jsonl", [{"messages": [*system, *itertools.chain(*exchanges)]}])
    whole = prepare(path, "messages")
    most = whole.counts.tokens - room
    source = prepare(path, "messages", max_length=most, overlong="truncate")
    kept = [*itertools.chain(*exchanges[num_lost:])]
    found = [word for word in decoded(source).split() if word.startswith("w")]
    assert found == " ".join(message["content"] for message in [*system, *kept]).split()
    assert answers(source)[0].split(" | ") == [f"{m['content']} </s>" for m in kept if m["role"] == "assistant"]
    assert source.counts.removed_tokens == whole.counts.tokens - source.counts.tokens
    assert source.counts.truncated == (num_lost > 0)
    assert source.counts.tokens <= most


def test_messages_after_the_last_answer_are_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER, QUESTION]}, MESSAGES])
    source = prepare(path, "messages")
    assert source.counts.trimmed == 1
    assert source.dataset["input_ids"][0] == source.dataset["input_ids"][1]


def test_fields_that_are_not_read_are_counted_once_a_row_and_said_in_one_line(tmp_path):
    """The template writes thoughts of the last answer only, and so makes two examples of the first row."""
    thought = "{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }} {% endif %}"
    template = "{% for m in messages %}" + thought + "{{ m.content }} </s>{% endfor %}"
    thinking = [QUESTION, {**ANSWER, "reasoning_content": "w5"}] * 2
    rows = [{"messages": thinking, "id": 1}, *[{**MESSAGES, "lang": "en", "id": n} for n in range(2)]]
    source = prepare(write(tmp_path / "rows.jsonl", rows), "messages", template=template)
    assert (source.counts.examples, source.counts.split) == (4, 1)
    said = "fields of rows that are not read (rows that have them): id (3), lang (2)"
    assert [remark for remark in source.counts.remarks() if "fields" in remark] == [said]


@pytest.mark.parametrize(("num_prompt", "refused"), [(198, False), (199, True)])
def test_less_than_one_trained_token_in_a_hundred_is_refused(tmp_path, num_prompt, refused):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "w1 " * num_prompt, "completion": "w2"}])
    if not refused:
        counts = prepare(path, "prompt_completion").counts
        assert (counts.trained_tokens, counts.tokens) == (2, 200)
        return
    for _ in ("made now", "from the cache"):
        with pytest.raises(ValueError, match=r"^src: only 2 of 201 tokens are answers to learn from, under 1%"):
            prepare(path, "prompt_completion")


@pytest.mark.parametrize(("shared", "warned"), [(0, False), (2, True)])
def test_examples_in_both_train_and_eval_are_counted_and_warned_about(tmp_path, shared, warned):
    rows = [{"prompt": f"w{number}", "completion": "w9"} for number in range(8)]
    train = write(tmp_path / "train.jsonl", [*rows[:5], rows[0]])
    evaluation = write(tmp_path / "held.jsonl", rows[5 - shared : 8])
    data = prepare_run(tmp_path, train, eval=evaluation)
    assert data.overlap == {"held": shared}
    text = f"warning: {shared} of {3 + shared} held-out examples of held are also trained on"
    assert any(text in note for note in data.notes) == warned


@pytest.mark.parametrize("seed", [0, 7])
def test_an_example_that_max_examples_leaves_out_is_not_trained_on(tmp_path, seed):
    rows = [{"prompt": f"w{number}", "completion": "w9"} for number in range(8)]
    first, second = (write(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:2]), ("b", rows[2:])))
    train = [{"path": str(first), "max_examples": 1}, {"path": str(second), "max_examples": 3}]
    held_out = [{"path": str(write(tmp_path / f"{number}.jsonl", [row]))} for number, row in enumerate(rows)]
    config = DataConfig(train=train, eval=held_out, cache_dir=str(tmp_path / "cache"), workers=1)
    data = prepare_data(config, tiny_tokenizer(), seed=seed)
    members = build_mixture(config, data.train, seed).members
    assert [int(name) for name, count in data.overlap.items() if count] == sorted(np.concatenate(members))


def test_an_example_written_in_another_format_overlaps_too(tmp_path):
    train = write(tmp_path / "train.jsonl", [MESSAGES])
    assert prepare_run(tmp_path, train, eval=write(tmp_path / "held.jsonl", [SHAREGPT])).overlap == {"held": 1}


@pytest.fixture
def encoded_batches(monkeypatch):
    """How many rows each call of the encoder was given."""
    calls: list[int] = []
    original = TextEncoder.__call__

    def counted(self, batch):
        calls.append(len(batch["json"]))
        return original(self, batch)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    return calls


def test_what_is_in_the_cache_is_not_encoded_again(tmp_path, encoded_batches):
    path = write(tmp_path / "rows.jsonl", [PAIR, OVERLONG])
    first = prepare(path, "prompt_completion", max_length=12, overlong="drop")
    assert encoded_batches == [2]
    again = prepare(path, "prompt_completion", max_length=12, overlong="drop", workers=2)
    assert encoded_batches == [2]
    assert (again.folder, again.digest, again.counts) == (first.folder, first.digest, first.counts)
    assert again.dataset[:] == first.dataset[:]
    assert left_out(again) == left_out(first)


def test_a_whole_run_finds_its_data_again(tmp_path, encoded_batches):
    train, held = write(tmp_path / "train.jsonl", [MESSAGES] * 3), write(tmp_path / "held.jsonl", [ALPACA])
    tokenizer = tiny_tokenizer()
    first = prepare_run(tmp_path, train, tokenizer, eval=held)
    for same in (tokenizer, tiny_tokenizer()):
        again = prepare_run(tmp_path, train, same, eval=held)
        assert [source.digest for source in again.train] == [source.digest for source in first.train]
    assert encoded_batches == [3, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"row": {**PAIR, "prompt": "w1 w5"}},
        {"tokenizer": word_tokenizer(words(0, 9))},
        {"tokenizer": byte_tokenizer()},
        {"max_length": 99},
        {"overlong": "drop"},
        {"bad_rows": "skip"},
        {"train_on": "everything"},
        {"fields": {"completion": "prompt", "prompt": "completion"}},
        {"row_format": "text"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_data_tokenizer_or_rules_have_a_folder_of_their_own(tmp_path, change):
    row, change = {**PAIR, **TEXT}, dict(change)
    first = prepare(write(tmp_path / "rows.jsonl", [row]), "prompt_completion")
    path = write(tmp_path / "rows.jsonl", [{**row, **change.pop("row", {})}])
    second = prepare(path, change.pop("row_format", "prompt_completion"), **change)
    assert second.folder != first.folder
    assert (
        first.dataset["input_ids"][:]
        == prepare(write(tmp_path / "rows.jsonl", [row]), "prompt_completion").dataset["input_ids"][:]
    )


def test_a_tokenizer_has_the_same_digest_after_use_and_another_one_when_a_token_changes():
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["w1", "w2 w3"])
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(tiny_tokenizer())
    tokenizer.add_tokens(["w1 w2"])
    assert tokenizer_digest(tokenizer) != before


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "all but the manifest", "a partial folder"])
def test_what_is_not_complete_is_made_again(tmp_path, encoded_batches, left):
    path = write(tmp_path / "rows.jsonl", [PAIR])
    first = prepare(path, "prompt_completion")
    if left == "nothing":
        for file in first.folder.iterdir():
            file.unlink()
        first.folder.rmdir()
    elif left == "an empty folder":
        for file in first.folder.iterdir():
            file.unlink()
    elif left == "all but the manifest":
        (first.folder / MANIFEST).unlink()
    else:
        (first.folder / MANIFEST).unlink()
        first.folder.rename(first.folder.with_name(f".{first.folder.name}.partial-x"))
    again = prepare(path, "prompt_completion")
    assert encoded_batches == [1, 1]
    assert (again.folder, again.digest) == (first.folder, first.digest)
    assert again.dataset["input_ids"][:] == [[*tiny_tokenizer()("w1 w2 w3")["input_ids"], 2]]


def _die_encoding(path: Path) -> None:
    def die(self: TextEncoder, batch: Any) -> None:
        os._exit(9)

    TextEncoder.__call__ = die
    prepare(path, "prompt_completion")


def test_a_process_that_was_killed_leaves_nothing_that_is_taken_for_complete(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR])
    process = multiprocessing.get_context("fork").Process(target=_die_encoding, args=(path,))
    process.start()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 9
    assert list((tmp_path / "cache").glob("src-*/*")) == []
    assert len(list((tmp_path / "cache").glob(".src-*.partial-*"))) == 1
    assert prepare(path, "prompt_completion").counts.examples == 1


def test_an_error_leaves_no_partial_folder(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR, {"prompt": "w1"}])
    with pytest.raises(ValueError, match="line 2"):
        prepare(path, "prompt_completion")
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if entry.suffix != ".lock"] == []


PREPARE_SLOWLY = """
import json, sys, time
from pathlib import Path
from support.tiny_tokenizer import word_tokenizer
from dora_dist.data.encoding.encoder import EncodingRules
from dora_dist.data.encoding.text import TextEncoder
from dora_dist.data.reading.files import locate
from dora_dist.data.cache import prepare_source

calls, original = [], TextEncoder.__call__

def slow(self, batch):
    calls.append(len(batch["json"]))
    time.sleep(1)
    return original(self, batch)

TextEncoder.__call__ = slow
print("ready", flush=True)
sys.stdin.readline()
rules = EncodingRules(format="prompt_completion")
source = prepare_source("src", locate(sys.argv[1]), rules, word_tokenizer("w1 w2 w3"), Path(sys.argv[2]), 1)
print(json.dumps([str(source.folder), source.digest, source.dataset["input_ids"][:], sum(calls)]), flush=True)
"""
"""Says that it is ready, waits for a line, prepares the file and says what came out and how many rows it encoded."""


@pytest.mark.timeout(PATIENCE_SECONDS)
def test_two_processes_at_the_same_time_make_one_folder_and_both_read_it(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR] * 3)
    command = [sys.executable, "-c", PREPARE_SLOWLY, str(path), str(tmp_path / "cache")]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(command, env=paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        first, second = (json.loads(process.stdout.readline()) for process in processes)
    assert first[:3] == second[:3]
    assert sorted((first[3], second[3])) == [0, 3]
    assert [str(folder) for folder in (tmp_path / "cache").glob("src-*") if folder.is_dir()] == [first[0]]


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory) -> Path:
    source = np.random.default_rng(0)
    rows: list[Any] = [
        {"prompt": words(0, int(source.integers(1, 9))), "completion": words(0, int(source.integers(1, 20)))}
        for _ in range(2600)
    ]
    rows[100], rows[2000] = {"prompt": "w1"}, b"no json"
    return write(tmp_path_factory.mktemp("many") / "rows.jsonl", rows)


def test_several_workers_make_what_one_makes(many_rows, tmp_path, capsys):
    rules = {"bad_rows": "skip", "overlong": "drop", "max_length": 20}
    made = []
    for workers in (1, 2):
        path = tmp_path / str(workers) / "rows.jsonl"
        path.parent.mkdir()
        path.symlink_to(many_rows)
        made.append(prepare(path, "prompt_completion", workers=workers, **rules))
        assert f"with {workers} worker" in capsys.readouterr().err
    one, two = made
    assert one.counts == two.counts
    assert one.digest == two.digest
    assert one.dataset["input_ids"][:] == two.dataset["input_ids"][:]
    assert [line["reason"] for line in left_out(one)] == [line["reason"] for line in left_out(two)]
    assert one.counts.bad == 2
    assert one.counts.overlong > 100
    assert one.counts.rows == 2600 == one.counts.examples + one.counts.bad + one.counts.overlong


def test_a_bad_row_in_a_worker_is_named_too(many_rows):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line (101: field 'completion' is|2001: the row cannot be)"):
        prepare(many_rows, "prompt_completion", workers=2)


def test_the_digest_depends_on_every_example_and_their_order(tmp_path):
    rows = [{"prompt": f"w{number}", "completion": "w9"} for number in range(4)]
    orders = ([0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2], [0, 1, 2, 2])
    digests = [
        prepare(write(tmp_path / "rows.jsonl", [rows[number] for number in order]), "prompt_completion").digest
        for order in orders
    ]
    assert len(set(digests)) == len(orders)


def test_only_the_first_rows_are_taken_on_request(tmp_path):
    path = write(tmp_path / "rows.jsonl", [PAIR] * 5)
    data = prepare_run(tmp_path, [{"path": str(path), "max_rows": 3}])
    assert data.train[0].counts.rows == 3


@pytest.mark.parametrize("name", ["org/name with ünïcode 日本" + "x" * 300, "../../escape", "."])
def test_the_folder_of_a_source_lies_in_the_cache_whatever_its_name_is(tmp_path, name):
    path = write(tmp_path / "rows.jsonl", [PAIR])
    rules = EncodingRules(format="prompt_completion")
    source = prepare_source(name, locate(str(path)), rules, tiny_tokenizer(), tmp_path / "cache", 1)
    assert source.folder.parent == tmp_path / "cache"
    assert source.folder.is_dir()


@pytest.mark.parametrize("changed", ["encoding/questions.py", "reading/files.py", "row_formats.py", "cache.py"])
def test_other_code_makes_other_data(tmp_path, changed):
    """A changed encoder must not read what the former one has made, in whichever folder of the package it is."""
    package = shutil.copytree(REPOSITORY / "dora_dist", tmp_path / "dora_dist")
    rows = locate(str(write(tmp_path / "rows.jsonl", [PAIR])))

    def key() -> str:
        spec = importlib.util.spec_from_file_location("copied_cache", package / "data" / "cache.py")
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        return copied._cache_key(rows, EncodingRules(format="prompt_completion"), tiny_tokenizer())

    before = key()
    assert key() == before
    with (package / "data" / changed).open("a") as file:
        file.write("# other\n")
    assert key() != before


def test_all_rows_of_a_batch_that_cannot_be_used_are_shown(tmp_path):
    bad = [{"instruction": "w1"}] * 12
    path = write(tmp_path / "rows.jsonl", [ALPACA, *bad, {"instruction": "w1", "answer": "w2"}])
    with pytest.raises(ValueError, match="13 of the rows read so far cannot be used:") as caught:
        prepare_run(tmp_path, path)
    lines = str(caught.value).splitlines()
    assert [line.split(", ")[1] for line in lines[1:11]] == [
        f"line {n}: field 'output' is missing; there is 'instruction'" for n in range(2, 12)
    ]
    assert lines[11:] == ["  and 3 more", "fix them, or set data.bad_rows to skip"]
