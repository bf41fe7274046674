import gzip
import json
from pathlib import Path

import pytest

from dora_dist.data.rows import Example, alpaca_prompt, read_examples

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PAIR = {"prompt": "1 and 2 is", "completion": " 3"}
ALPACA_EXAMPLE = Example("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n", "3")
PAIR_EXAMPLE = Example("1 and 2 is", " 3")


@pytest.fixture
def write(tmp_path: Path):
    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        text = json.dumps(rows) if path.suffix == ".json" else lines
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
@pytest.mark.parametrize(("row", "example"), [(ALPACA, ALPACA_EXAMPLE), (PAIR, PAIR_EXAMPLE)])
def test_formats_are_told_apart_by_their_fields(write, name, row, example):
    assert read_examples(write([{**row, "source": "x"}, row], name)) == [example, example]


def test_a_named_format_wins_over_what_the_fields_look_like(write):
    path = write([{**ALPACA, **PAIR}])
    assert read_examples(path, "prompt_completion") == [PAIR_EXAMPLE]
    assert read_examples(path, "alpaca") == [ALPACA_EXAMPLE]


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_an_alpaca_row_without_input_has_a_prompt_without_that_part(write, empty):
    (example,) = read_examples(write([{"instruction": "Say hi.", "output": "hi", **empty}]))
    assert example == Example("### Instruction:\nSay hi.\n\n### Response:\n", "hi")
    assert alpaca_prompt("Say hi.") == example.prompt


def test_rows_keep_their_order_over_lists_and_globs(write, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        write([{"prompt": name, "completion": str(number)} for number in range(3)], name)
    names = [example.prompt + example.completion for example in read_examples(str(tmp_path / "*.jsonl"))]
    assert names == [f"{name}.jsonl{number}" for name in "ab" for number in range(3)]
    both = read_examples([str(tmp_path / "c.json"), str(tmp_path / "a.jsonl")])
    assert [example.prompt for example in both] == ["c.json"] * 3 + ["a.jsonl"] * 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ALPACA, {"instruction": "x"}], r"rows\.jsonl, row 2: field 'output' of format alpaca must be text, got None"),
        ([PAIR, PAIR, {**PAIR, "prompt": None}], r"rows\.jsonl, row 3: field 'prompt' of format prompt_completion"),
        ([{**ALPACA, "output": 3}], r"rows\.jsonl, row 1: field 'output' of format alpaca must be text, got 3"),
        ([{**ALPACA, "input": ["x"]}], r"rows\.jsonl, row 1: field 'input' .* got \['x'\]"),
        ([ALPACA, {**ALPACA, "output": " \n"}], r"rows\.jsonl, row 2: field 'output' is empty"),
        ([{**PAIR, "completion": ""}], r"rows\.jsonl, row 1: field 'completion' is empty"),
        ([{"question": "x", "answer": "y"}], r"rows\.jsonl: the fields question, answer fit no known format.*alpaca"),
    ],
)
def test_a_bad_row_is_refused_with_file_row_and_field(write, rows, message):
    with pytest.raises(ValueError, match=message):
        read_examples(write(rows))


@pytest.mark.parametrize("value", [{"text": "3"}, 5, True, ["3"]])
def test_a_row_of_another_type_than_those_before_is_the_one_that_is_named(write, value):
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 3: field 'output' .* must be text, got"):
        read_examples(write([ALPACA, ALPACA, {**ALPACA, "output": value}]))


@pytest.mark.parametrize(
    "text", ["2024-01-01", "2024-01-01T00:00:00Z", "3", "true", "null", "1e5", " ünïcode\u2028x\n"]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_text_stays_the_text_that_it_is(write, name, text):
    assert read_examples(write([{"prompt": text, "completion": text}], name)) == [Example(text, text)]


def test_blank_lines_are_passed_over(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{json.dumps(PAIR)}\r\n\r\n{json.dumps(PAIR)}\r\n\r\n", "utf-8")
    assert read_examples(str(tmp_path / "rows.jsonl")) == [PAIR_EXAMPLE] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"[]", "has no rows"),
        (b"{not json\n", "line 1 cannot be read as JSON"),
        (b'{"prompt": "x", "completion": "y"}\njust text\n', "line 2 cannot be read as JSON"),
        (b'[{"prompt": "x"},\n', "cannot be read as JSON"),
        (b"[1]", "row 1: a row must be an object with named fields, got 1"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_what_is_no_rows_is_refused_with_its_file(tmp_path, content, message):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\.json.*{message}"):
        read_examples(str(tmp_path / "rows.json"))


def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"no data file matches '.*nowhere\.jsonl'"):
        read_examples(str(tmp_path / "nowhere.jsonl"))
