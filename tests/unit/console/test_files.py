"""Records that grow line by line, of which a process that is killed may leave half a line."""

import json

import pytest

from dora_dist.console.files import append_line, read_lines

WHOLE = json.dumps({"text": "größer"}, ensure_ascii=False)


@pytest.mark.parametrize("left", [1, 9, 13, len(WHOLE.encode()) - 1])
def test_a_line_after_a_torn_one_is_read_and_the_torn_one_is_named(tmp_path, capsys, left):
    path = tmp_path / "record.jsonl"
    append_line(path, json.dumps({"step": 1}))
    with path.open("ab") as file:
        file.write(WHOLE.encode()[:left])
    assert read_lines(path) == [{"step": 1}]
    assert capsys.readouterr().err == "", "it may be being written"
    for step in (2, 3):
        append_line(path, json.dumps({"step": step}))
    assert read_lines(path) == [{"step": step} for step in (1, 2, 3)]
    assert "record.jsonl: line 2 is torn" in capsys.readouterr().err


def test_a_line_that_lacks_its_end_only_is_kept(tmp_path, capsys):
    path = tmp_path / "record.jsonl"
    path.write_text('{"step": 1}')
    append_line(path, '{"step": 2}')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert capsys.readouterr().err == ""
