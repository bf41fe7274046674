import csv
import gzip
import io
import json
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_dist.data.reading.files import Location, RawRow, locate, read_file

TEXTS = [
    "2024-01-01",
    "2024-01-01T00:00:00Z",
    "12:30",
    "007",
    "3",
    "3.0",
    "1e5",
    "1,000",
    "NaN",
    "NA",
    "nan",
    "null",
    "None",
    "true",
    "False",
    "inf",
    "",
    " both ends ",
    'a, "quoted" b',
    '"',
    "two\nlines",
    "two\r\nlines",
    "a\rb",
    "a\tb",
    "\\n",
    "ünïcode 日本 😀",
    "\u2028x\u2029\x85\x0b\x0c\x1c",
    "{}",
    "#",
]
ROWS = [{"prompt": f"number {number}", "completion": text} for number, text in enumerate(TEXTS)]


def lines(rows: Sequence[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(rows: Sequence[dict], delimiter: str = ",") -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def save_arrow(path: Path, rows: Sequence[dict], new: Callable = pa.ipc.new_stream) -> None:
    content = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as sink, new(sink, content.schema) as writer:
        writer.write_table(content)


def save_splits(path: Path, rows: Sequence[dict]) -> None:
    other = datasets.Dataset.from_list([{"prompt": "of another split", "completion": "x"}])
    datasets.DatasetDict({"other": other, "train": datasets.Dataset.from_list(list(rows))}).save_to_disk(str(path))


BOM = b"\xef\xbb\xbf"
WRITERS: dict[str, Callable[[Path, Sequence[dict]], Any]] = {
    "rows.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "members.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress(lines(rows[:3])) + gzip.compress(lines(rows[3:]))
    ),
    "bom.jsonl": lambda path, rows: path.write_bytes(BOM + lines(rows)),
    "crlf.jsonl": lambda path, rows: path.write_bytes(lines(rows, "\r\n")),
    "blank_lines.jsonl": lambda path, rows: path.write_bytes(b"\n" + lines(rows, "\n \n\n")),
    "no_last_line_end.jsonl": lambda path, rows: path.write_bytes(lines(rows).removesuffix(b"\n")),
    "lines.json": lambda path, rows: path.write_bytes(lines(rows)),
    "without_suffix": lambda path, rows: path.write_bytes(lines(rows)),
    "rows.json": lambda path, rows: path.write_text(json.dumps(list(rows))),
    "list.jsonl": lambda path, rows: path.write_text(json.dumps(list(rows))),
    "pretty.json": lambda path, rows: path.write_text(f"\n {json.dumps(list(rows), indent=2)}\n\n"),
    "dense.json": lambda path, rows: path.write_text(json.dumps(list(rows), separators=(",", ":"))),
    "bom.json": lambda path, rows: path.write_bytes(BOM + json.dumps(list(rows), ensure_ascii=False).encode()),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(list(rows)).encode())),
    "rows.csv": lambda path, rows: path.write_bytes(table(rows)),
    "bom.csv": lambda path, rows: path.write_bytes(BOM + table(rows)),
    "rows.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(table(rows))),
    "rows.tsv": lambda path, rows: path.write_bytes(table(rows, "\t")),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(list(rows)), path),
    "stream.arrow": save_arrow,
    "file.arrow": lambda path, rows: save_arrow(path, rows, pa.ipc.new_file),
    "saved": lambda path, rows: datasets.Dataset.from_list(list(rows)).save_to_disk(str(path)),
    "saved_splits": save_splits,
}
"""By the name of the file or folder that they write."""


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(path: Path, **settings: Any) -> list[dict]:
    return [parsed(row) for row in locate(str(path), **settings).rows()]


def parsed(row: RawRow) -> dict:
    assert not row.flaw
    return json.loads(row.json)


@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_the_same_from_every_kind_of_file(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", WRITERS)
def test_a_column_of_texts_that_are_all_alike_is_not_taken_for_something_else(tmp_path, name):
    alike = {"date": "2024-01-01", "time": "2024-01-01T00:00:00Z", "int": "007", "float": "1e5", "bool": "true"}
    rows = [{**alike, "none": "null", "empty": ""}] * 4
    WRITERS[name](tmp_path / name, rows)
    assert read(tmp_path / name) == rows


@pytest.mark.parametrize("name", WRITERS)
def test_only_as_many_rows_are_read_as_asked_for(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    assert read(tmp_path / name, limit=5) == ROWS[:5]


NESTED = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}], "id": 1.5, "ok": True}
    for text in TEXTS
]


@pytest.mark.parametrize("name", [name for name in WRITERS if "csv" not in name and "tsv" not in name])
def test_conversations_are_the_same_from_every_kind_of_file_that_can_hold_them(tmp_path, name):
    WRITERS[name](tmp_path / name, NESTED)
    rows = read(tmp_path / name)
    if name == "saved_splits":
        rows = [{key: row[key] for key in NESTED[0]} for row in rows]
    assert rows == NESTED


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "stream.arrow", "saved"])
def test_what_is_no_text_does_not_become_text(tmp_path, name):
    row = {"int": 7, "float": 1.5, "bool": True, "none": None, "list": ["x"], "object": {"x": "y"}}
    WRITERS[name](tmp_path / name, [row])
    assert read(tmp_path / name) == [row]


def test_a_value_that_json_does_not_have_is_an_object_that_names_its_type(tmp_path):
    moment = pa.array([0], pa.timestamp("s"))
    pq.write_table(pa.table({"when": moment, "bytes": [b"x"]}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [{"when": {"type": "datetime"}, "bytes": {"type": "bytes"}}]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
JSON_ROWS = st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=4)
WITH_LONE_SURROGATES = st.text(st.characters(codec=None, categories=None), max_size=8)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
@given(rows=JSON_ROWS)
@settings(max_examples=40, deadline=None)
def test_any_json_goes_through_a_list_unchanged(tmp_path_factory, rows, ascii_only, indent):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8", newline="")
    assert [parsed(row) for row in read_file(path)] == rows


@pytest.mark.parametrize("ascii_only", [True, False])
@given(rows=JSON_ROWS)
@settings(max_examples=40, deadline=None)
def test_any_json_goes_through_lines_unchanged(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="")
    found = list(read_file(path))
    assert [parsed(row) for row in found] == rows
    assert [row.place for row in found] == [f"{path}, line {number}" for number in range(1, len(rows) + 1)]


@pytest.mark.parametrize("listed", [True, False])
@given(text=WITH_LONE_SURROGATES)
@settings(max_examples=40, deadline=None)
def test_half_a_surrogate_pair_in_an_escape_is_read_as_it_stands(tmp_path_factory, text, listed):
    path = tmp_path_factory.getbasetemp() / "surrogates.json"
    row = {"text": text}
    path.write_text(json.dumps([row] if listed else row), encoding="ascii")
    assert [parsed(found) for found in read_file(path)] == [row]


@given(texts=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_any_text_goes_through_a_table_unchanged(tmp_path_factory, texts, delimiter):
    path = tmp_path_factory.getbasetemp() / ("any.csv" if delimiter == "," else "any.tsv")
    rows = [{"number": str(number), "a": a, "b": b} for number, (a, b) in enumerate(texts)]
    path.write_bytes(table(rows, delimiter))
    assert [parsed(row) for row in read_file(path)] == rows


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (b'{"a": 1}\n\n{"a": 2}\n', ["line 1", "line 3"]),
        (b'\xef\xbb\xbf\r\n{"a": 1}\r\n', ["line 2"]),
        (b'[{"a": 1},\n\n{"a": 2}]', ["row 1", "row 2"]),
    ],
)
def test_a_row_knows_its_place(tmp_path, content, places):
    (tmp_path / "rows.json").write_bytes(content)
    assert [row.place for row in read_file(tmp_path / "rows.json")] == [f"{tmp_path}/rows.json, {p}" for p in places]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "stream.arrow", "saved"])
def test_rows_of_tables_are_counted_from_one(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS[:2])
    assert [row.place for row in read_file(tmp_path / name)] == [f"{tmp_path / name}, row {n}" for n in (1, 2)]


def test_a_line_that_is_not_utf_8_is_a_flaw_of_that_row_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 2}\n')
    first, second, third = read_file(tmp_path / "rows.jsonl")
    assert (parsed(first), parsed(third)) == ({"a": 1}, {"a": 2})
    assert second.place.endswith("rows.jsonl, line 2")
    assert "not UTF-8" in second.flaw
    assert not second.json


@pytest.mark.parametrize("content", [b"", b" \n\n", b"[]", b" [ ]\n", BOM, BOM + b"[]"])
def test_a_file_without_rows_gives_none(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    assert list(read_file(tmp_path / "rows.json")) == []


@pytest.mark.parametrize("elements", [[[1], [2]], [1, "x", None, True], [[]], [{}, {"a": [[], {}]}], ["]", "a\\", '"']])
def test_elements_of_a_list_may_be_anything(tmp_path, elements):
    (tmp_path / "rows.json").write_text(json.dumps(elements))
    assert [json.loads(row.json) for row in read_file(tmp_path / "rows.json")] == elements


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}', r"neither a comma nor the end of the list: line 1 column 10"),
        ('[{"a": 1},\n', r"Expecting value: line 2 column 1"),
        ('[{"a": 1},\n {"a"', r"Expecting ':' delimiter: line 2 column 6"),
        ('[{"a": 1},\n {"a": "x', r"Unterminated string starting at: line 2 column 8"),
        ('[{"a": 1} {"a": 2}]', r"neither a comma nor the end of the list: line 1 column 11"),
        ('[{"a": 1}]\n{"a": 2}', r"more text after the list: line 1 column 11"),
        ("[1] ]", r"more text after the list: line 1 column 4"),
        ("[,]", r"Expecting value: line 1 column 2"),
        ("[{'a': 1}]", r"Expecting property name enclosed in double quotes: line 1 column 3"),
        ('[{"a": "two\nlines"}]', r"Invalid control character at: line 1 column 12"),
    ],
)
def test_a_list_that_is_no_json_is_refused_with_the_file_and_where(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=rf"/rows\.json cannot be read: JSONDecodeError: {message}"):
        list(read_file(tmp_path / "rows.json"))


def test_a_comma_before_the_end_of_a_list_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text('[{"a": 1},]')
    with pytest.raises(ValueError, match=r"/rows\.json cannot be read: JSONDecodeError"):
        list(read_file(tmp_path / "rows.json"))


def test_a_list_may_begin_late(tmp_path):
    (tmp_path / "rows.json").write_text(" " * 5000 + '[{"a": 1}]')
    assert read(tmp_path / "rows.json") == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'[{"a": "\xff"}]', "UnicodeDecodeError: .* position 8"),
        ("rows.jsonl.gz", b'{"a": 1}\n', "BadGzipFile"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-12], "EOFError"),
        ("rows.json.gz", gzip.compress(b"[" + b'{"a": 1},' * 1000 + b"{}]", mtime=0)[:-12], "EOFError"),
        ("rows.csv.gz", b"a,b\n1,2\n", "BadGzipFile"),
        ("rows.csv", b'a,b\n1,"x\n3,4\n', "EOF inside string|unexpected end of data"),
        ("rows.csv", b"a,b\n1,\xff\n", "UnicodeDecodeError"),
        ("rows.parquet", b"PAR1", "ArrowInvalid"),
        ("rows.parquet", b"", "ArrowInvalid"),
        ("rows.arrow", b"no arrow file", "ArrowInvalid"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} cannot be read: .*({message})"):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize("content", [b"", b"\n1,2\n", b"a,a\n1,2\n"])
def test_a_table_must_name_every_column(tmp_path, content):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"/rows\.csv: the first line must name every column, each once, got \["):
        list(read_file(tmp_path / "rows.csv"))


def refusal(path: Path) -> str:
    """What is said of a file with one bad line, whether that stops the reading or is a flaw of the row."""
    try:
        return "; ".join(f"{row.place}: {row.flaw}" for row in read_file(path) if row.flaw)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "content",
    [
        "prompt,completion\na,b\nd,e,f\n",
        "prompt,completion\na,b,c\nd,e,f\n",
        "prompt,completion\na,b,\nd,e,\n",
        "prompt,completion\na\nd,e\n",
        'prompt,completion\n"a,b\nd"\ne,f\n',
    ],
    ids=["more later", "more", "a comma at the end", "fewer", "an open quotation mark"],
)
def test_a_line_of_a_table_with_more_or_fewer_fields_than_names_is_refused(tmp_path, content):
    (tmp_path / "rows.csv").write_text(content)
    assert str(tmp_path / "rows.csv") in refusal(tmp_path / "rows.csv")


def test_empty_lines_of_a_table_are_passed_over(tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\n\nb\n\n")
    assert read(tmp_path / "rows.csv") == [{"text": "a"}, {"text": "b"}]


def test_a_table_with_a_column_of_row_numbers_without_a_name_can_be_read(tmp_path):
    (tmp_path / "rows.csv").write_text(",prompt,completion\n0,a,b\n")
    assert [row["completion"] for row in read(tmp_path / "rows.csv")] == ["b"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "stream.arrow"])
@pytest.mark.parametrize("folder", ["with space", ".hidden", "__cache__", "100%#", "a,b{c}"])
def test_the_folder_of_a_file_may_have_any_name(tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    WRITERS[name](tmp_path / folder / name, ROWS[:2])
    assert [parsed(row) for row in read_file(tmp_path / folder / name)] == ROWS[:2]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "stream.arrow"])
def test_the_folder_of_a_file_may_have_brackets(tmp_path, name):
    (tmp_path / "run[1]").mkdir()
    WRITERS[name](tmp_path / "run[1]" / name, ROWS[:2])
    assert [parsed(row) for row in read_file(tmp_path / "run[1]" / name)] == ROWS[:2]


@pytest.mark.parametrize("others", [[], ["rows1.jsonl"]], ids=["alone", "beside one that the glob fits"])
def test_a_file_that_is_there_is_itself_and_no_glob(tmp_path, others):
    for name in ["rows[1].jsonl", *others]:
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert read(tmp_path / "rows[1].jsonl") == [{"name": "rows[1].jsonl"}]


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "c.json", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps({"name": name, "n": n}) + "\n" for n in range(2)))
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["c.json", "a.jsonl"], ["c.json", "a.jsonl"]),
        (["c.json", "[ab].jsonl"], ["c.json", "a.jsonl", "b.jsonl"]),
        (["**/*.jsonl"], ["a.jsonl", "b.jsonl", "deep/d.jsonl"]),
    ],
)
def test_files_come_in_the_order_of_their_list_and_of_their_names_in_a_glob(numbered, patterns, names):
    paths = [str(numbered / pattern) for pattern in patterns]
    for named in [paths, *paths[: len(paths) == 1]]:
        rows = [json.loads(row.json) for row in locate(named).rows()]
        assert rows == [{"name": name, "n": n} for name in names for n in range(2)]


def test_a_path_may_begin_with_the_home_folder(numbered, monkeypatch):
    monkeypatch.setenv("HOME", str(numbered))
    assert locate("~/a.jsonl").files == (numbered / "a.jsonl",)


@pytest.mark.parametrize(
    "paths", ["./nowhere", "/nowhere", "nowhere.jsonl", "no/where.csv", "no*", "a/b/c", ["a.jsonl", "nowhere"]]
)
def test_what_is_not_there_and_on_no_hub_is_refused_with_its_name(numbered, monkeypatch, paths):
    monkeypatch.chdir(numbered)
    missing = paths if isinstance(paths, str) else paths[-1]
    with pytest.raises(
        ValueError,
        match=f"^no data file matches {re.escape(repr(missing))} .looked from {numbered}.: correct data\\.train or",
    ):
        locate(paths)


def test_a_folder_that_was_not_saved_by_datasets_is_refused_with_a_way_out(numbered):
    with pytest.raises(ValueError, match=r"deep is a folder, .*name its files, with a glob such as .*/deep/\*\.jsonl"):
        locate(str(numbered / "deep"))


def test_a_split_of_a_saved_folder_is_chosen_by_its_name(tmp_path):
    save_splits(tmp_path / "saved", ROWS)
    assert read(tmp_path / "saved", split="other") == [{"prompt": "of another split", "completion": "x"}]
    with pytest.raises(ValueError, match=r"saved has no split 'test', but other, train: set the split of the source"):
        read(tmp_path / "saved", split="test")


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("saved", {"split": "test"}, "split of a source is test, .* the Hub and a folder that was saved with several"),
        ("rows.jsonl", {"split": "train"}, "split of a source is train, which has no effect"),
        ("rows.jsonl", {"columns": ("a", "b")}, r"columns of a source is \['a', 'b'\], .* read for a table"),
        ("rows.parquet", {"quotes": False}, "quotes of a source is false, .* read for a table"),
        ("rows.csv", {"text": "lines"}, "text of a source is lines, .* read for a text file"),
        ("rows.json", {"subset": "main"}, "subset of a source is main, .* read for a data set on the Hub"),
        ("saved_splits", {"revision": "v1"}, "revision of a source is v1, .* read for a data set on the Hub"),
        ("org/name", {"text": "whole"}, "text of a source is whole, .* and org/name is none. Omit text, or correct"),
    ],
)
def test_a_setting_that_nothing_at_the_location_reads_is_refused(tmp_path, name, setting, message):
    path = name
    if name in WRITERS:
        path = str(tmp_path / name)
        WRITERS[name](tmp_path / name, ROWS)
    with pytest.raises(ValueError, match=message):
        locate(path, **setting)


def test_a_setting_that_one_of_several_files_reads_is_taken(tmp_path):
    for name in ("rows.csv", "rows.jsonl"):
        WRITERS[name](tmp_path / name, ROWS)
    rows = locate([str(tmp_path / "rows.csv"), str(tmp_path / "rows.jsonl")], columns=("a", "b")).rows()
    assert [list(parsed(row)) for row in rows][:: len(ROWS) + 1] == [["a", "b"], ["prompt", "completion"]]


def test_the_digest_is_that_of_the_content(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path, text in zip(paths, ("x", "x", "y"), strict=True):
        path.write_text(json.dumps({"text": text}))
    first, same, other = (locate(str(path)).digest() for path in paths)
    assert first == same != other
    assert locate(str(paths[0]), limit=1).digest() != first
    assert locate([str(paths[0]), str(paths[2])]).digest() != locate([str(paths[2]), str(paths[0])]).digest()


def test_the_digest_of_a_saved_folder_depends_on_its_rows_and_the_split(tmp_path):
    save_splits(tmp_path / "one", ROWS)
    save_splits(tmp_path / "two", [*ROWS[:-1], {"prompt": "another", "completion": "row"}])
    one, other_split, two = (
        locate(str(tmp_path / name), split=split).digest()
        for name, split in (("one", "train"), ("one", "other"), ("two", "train"))
    )
    assert len({one, other_split, two}) == 3


def test_the_digest_of_files_that_are_read_differently_differs(tmp_path):
    for name, content in (("a.csv", "t\tu,v"), ("a.tsv", "t\tu,v"), ("1.csv", "t\n"), ("2.csv", "u\n")):
        (tmp_path / name).write_text(content)
    (tmp_path / "12.csv").write_text("t\nu\n")
    assert locate(str(tmp_path / "a.csv")).digest() != locate(str(tmp_path / "a.tsv")).digest()
    both = locate([str(tmp_path / "1.csv"), str(tmp_path / "2.csv")])
    assert both.digest() != locate(str(tmp_path / "12.csv")).digest()


@pytest.mark.parametrize("name", ["org/name", "squad", "org/name-1.5"])
@pytest.mark.parametrize("asked", [lambda location: next(location.rows()), Location.digest], ids=["rows", "digest"])
def test_a_name_that_is_on_no_hub_in_reach_is_refused_soon_with_what_was_tried(name, asked):
    location = locate(name, subset="s", revision="r")
    assert location.hub == name
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"'{name}' is no file here \(looked from .* as a data set from the Hub: \w+"):
        asked(location)
    assert time.monotonic() - began < 5


def test_a_hub_that_cannot_be_reached_is_no_crash(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="'org/name' is no file here"):
        locate("org/name").digest()


def test_rows_of_the_hub_stream_in_the_subset_split_and_revision_asked_for(monkeypatch):
    asked, given_out = [], []

    def endless() -> Iterator[dict]:
        for number in range(10**9):
            given_out.append(number)
            yield {"text": str(number)}

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict]:
        asked.append((args, kwargs))
        return endless()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    location = locate("org/name", subset="s", split="test", revision="v1", limit=3)
    assert [parsed(row) for row in location.rows()] == [{"text": str(number)} for number in range(3)]
    assert given_out == [0, 1, 2]
    assert asked == [(("org/name", "s"), {"split": "test", "revision": "v1", "streaming": True})]
    assert [row.place for row in location.rows()][-1] == "org/name (test), row 3"


def test_the_digest_of_the_hub_is_that_of_the_commit(monkeypatch):
    commits = {None: "1", "v1": "1", "v2": "2"}

    class Info:
        def __init__(self, sha: str) -> None:
            self.sha = sha

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: Info(commits[revision]))
    newest, first, second = (locate("org/name", revision=revision).digest() for revision in commits)
    assert newest == first != second
    assert locate("org/other").digest() != newest


def test_a_hub_that_breaks_off_is_named(monkeypatch):
    def breaking(*args: Any, **kwargs: Any) -> Iterator[dict]:
        yield {"text": "x"}
        raise ConnectionError("broke off")

    monkeypatch.setattr(datasets, "load_dataset", breaking)
    with pytest.raises(ValueError, match=r"'org/name'.*broke off"):
        list(locate("org/name").rows())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "stream.arrow"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, name):
    chunk = pa.Table.from_pylist([{"prompt": "x" * 600, "completion": "y" * 600}] * 200)
    peaks = []
    for num_chunks in (50, 150):
        path = tmp_path / str(num_chunks) / name
        path.parent.mkdir()
        if name == "rows.parquet":
            with pq.ParquetWriter(path, chunk.schema) as writer:
                for _ in range(num_chunks):
                    writer.write_table(chunk)
        elif name == "stream.arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, chunk.schema) as writer:
                for _ in range(num_chunks):
                    writer.write_table(chunk)
        else:
            WRITERS[name](path, chunk.to_pylist() * num_chunks)
        peaks.append(_peak(path, 200 * num_chunks))
    assert peaks[1] < 1.3 * peaks[0] + 2e6
    assert peaks[1] < 25e6


def _peak(path: Path, num_rows: int) -> int:
    """Most bytes of Python and of Arrow while the rows of a file go by."""
    before, arrow, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for _ in read_file(path):
        count += 1
        arrow = max(arrow, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == num_rows
    return arrow + python


def test_quotation_marks_may_be_characters_like_others(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('\ufeffa\tb\n" x " y\t"z"\n\tx "y\n', encoding="utf-8")
    rows = [json.loads(row.json) for row in locate(str(path), quotes=False).rows()]
    assert rows == [{"a": '" x " y', "b": '"z"'}, {"a": "", "b": 'x "y'}]
    with pytest.raises(ValueError, match=r"quotation marks are characters like others .* set quotes: false"):
        list(locate(str(path)).rows())
    assert locate(str(path)).digest() != locate(str(path), quotes=False).digest()


@pytest.mark.parametrize("part", ["train", "dev"])
@pytest.mark.parametrize("name", ["CoLA", "MRPC", "RTE", "SST-2", "STS-B"])
def test_every_row_of_glue_is_read_as_it_stands(shared, name, part):
    path = shared / f"data/glue/{name}/{part}.tsv"
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")]
    columns = ["source", "label", "star", "sentence"] if name == "CoLA" else []
    names = columns or lines.pop(0)
    found = [json.loads(row.json) for row in locate(str(path), columns=tuple(columns), quotes=False).rows()]
    assert len(found) > 200
    assert found == [dict(zip(names, line, strict=True)) for line in lines]


def test_a_text_file_is_read_by_line_or_as_a_whole_where_that_is_said(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text('one\n\n{"two"}\n', encoding="utf-8")
    assert [(row.place, json.loads(row.json)) for row in read_file(path, text="lines")] == [
        (f"{path}, line 1", {"text": "one"}),
        (f"{path}, line 3", {"text": '{"two"}'}),
    ]
    assert [json.loads(row.json) for row in read_file(path, text="whole")] == [{"text": 'one\n\n{"two"}\n'}]
    with pytest.raises(ValueError, match=r"is a text file: give its source text: lines .* or give rows as \.jsonl"):
        list(read_file(path))
