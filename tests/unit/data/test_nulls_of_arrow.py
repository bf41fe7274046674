"""Nulls that Arrow puts where a row has no such key: in calls of tools and in the tools."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.byte_tokenizer import byte_tokenizer

from dora_dist.config.data import DataConfig
from dora_dist.setup.run_data import RunData, prepare_data

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(name: str, argument: str, with_tools: bool = False) -> dict[str, Any]:
    """One call; the tools of two such rows differ in a key."""
    call = {"type": "function", "function": {"name": name, "arguments": {argument: ["x"]}}}
    messages = [{"role": "user", "content": "Do it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    parameters = {"type": "object", "properties": {argument: {"type": "array"}}}
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return {"messages": messages, **({"tools": [tool]} if with_tools else {})}


def with_text(row: dict[str, Any]) -> dict[str, Any]:
    """The row with arguments and tools as JSON text."""
    row = copy.deepcopy(row)
    function = row["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    return {**row, "tools": json.dumps(row["tools"])} if "tools" in row else row


CALLS = [conversation("weather", "city"), conversation("search", "query")]
TOOLS = [conversation("weather", "city", with_tools=True), conversation("search", "query", with_tools=True)]


def write_arrow(rows: list[dict], path: Path) -> None:
    content = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)


WRITERS = {
    "saved": lambda rows, path: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
    "rows.parquet": lambda rows, path: pq.write_table(pa.Table.from_pylist(rows), path),
    "rows.arrow": write_arrow,
    "rows.jsonl": lambda rows, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
}


@pytest.fixture(autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def prepare(folder: Path, name: str, rows: list[dict], **source: Any) -> RunData:
    WRITERS.get(name, lambda rows, path: None)(rows, folder / name)
    path = str(folder / name) if name in WRITERS else name
    (folder / "tools.jinja").write_text(TEMPLATE)
    settings = {"chat_template": str(folder / "tools.jinja"), "cache_dir": str(folder / "cache"), "workers": 1}
    return prepare_data(DataConfig(train={"path": path, **source}, **settings), byte_tokenizer("chatml"))


@pytest.mark.parametrize("name", ["saved", "rows.parquet", "rows.arrow", "org/name"])
def test_arguments_that_arrow_has_filled_with_nulls_are_refused_with_the_way_out(tmp_path, monkeypatch, name):
    dataset = datasets.Dataset.from_list(CALLS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    monkeypatch.setattr("dora_dist.data.reading.files.Location._commit", lambda location: "commit")
    with pytest.raises(
        ValueError, match=r"row 1: field 'messages\[1\]\.tool_calls\[0\]\.arguments' has null at query, .*JSON text"
    ):
        prepare(tmp_path, name, CALLS)


@pytest.mark.parametrize("name", ["saved", "rows.parquet", "rows.arrow"])
def test_tools_that_arrow_has_filled_with_nulls_are_refused_under_the_rows_own_name(tmp_path, name):
    rows = [{"messages": with_text(row)["messages"], "abilities": row["tools"]} for row in TOOLS]
    flaw = r"row 1: field 'abilities' has null at 0\.function\.parameters\.properties\.query, .*JSON text"
    with pytest.raises(ValueError, match=flaw):
        prepare(tmp_path, name, rows, fields={"tools": "abilities"})


@pytest.mark.parametrize("name", ["saved", "rows.parquet", "rows.arrow"])
def test_arguments_and_tools_as_json_text_are_the_same_from_arrow_as_from_lines(tmp_path, name):
    expected = prepare(tmp_path, "rows.jsonl", TOOLS).train[0]
    assert "null" not in byte_tokenizer("chatml").decode(expected.dataset[0]["input_ids"])
    assert prepare(tmp_path, name, [with_text(row) for row in TOOLS]).train[0].digest == expected.digest


def test_objects_of_the_same_keys_in_all_rows_are_read_from_arrow(tmp_path):
    rows = [conversation("weather", "city", with_tools=True), conversation("time", "city", with_tools=True)]
    expected = prepare(tmp_path, "rows.jsonl", rows).train[0]
    assert prepare(tmp_path, "rows.parquet", rows).train[0].digest == expected.digest


def test_a_null_that_stands_in_lines_is_the_rows_own(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": None}}}
    rows = [{"messages": [{"role": "user", "content": "Do it"}, {"role": "assistant", "tool_calls": [call]}]}]
    source = prepare(tmp_path, "rows.jsonl", rows).train[0]
    assert '{"city": null}' in byte_tokenizer("chatml").decode(source.dataset[0]["input_ids"])
