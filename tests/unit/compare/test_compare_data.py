"""What a comparison finds in its data before any cell runs."""

import shutil

import pytest
from support.comparison import write_comparison

from dora_dist.compare.data import prepare
from dora_dist.compare.plan import Plan
from dora_dist.compare.settings import parse_compare


@pytest.fixture
def prepared(tmp_path):
    """``prepared(task)``: the data of a comparison whose only task is this one."""

    def prepared(task):
        return prepare(Plan(parse_compare(["--config", str(write_comparison(tmp_path, tasks={"echo": task}))])))

    return prepared


def test_rates_may_not_be_chosen_on_rows_that_are_reported(prepared, tmp_path):
    write_comparison(tmp_path)
    split, search, copied = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "copied.jsonl"))
    shutil.copy(search, copied)
    with pytest.raises(ValueError, match=r"30 of 30 examples of search are also in data\.eval"):
        prepared({"data": {"eval": copied}, "search": search})
    with pytest.raises(ValueError, match=r"30 of 30 examples of search are also in parts\.en"):
        prepared({"data": {"eval": split}, "search": search, "parts": {"en": copied}})


def test_a_row_that_two_splits_share_is_noted_and_every_source_has_its_digest(prepared, tmp_path):
    write_comparison(tmp_path)
    split, search, mixed = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "mixed.jsonl"))
    rows = [path.read_text().splitlines(keepends=True) for path in (split, search)]
    mixed.write_text("".join(rows[0][:9] + rows[1][-1:]))
    found = prepared({"data": {"eval": str(split)}, "search": str(search), "parts": {"en": str(mixed)}})["echo"]
    assert [note for note in found.notes if "search split" in note] == [
        "echo: 1 examples of the search split are also en ones"
    ]
    assert list(found.digests) == ["train", "search", "reported", "en"]


@pytest.mark.parametrize("name", ["en", "search", "reported"])
def test_a_training_source_of_the_name_of_a_held_out_one_has_a_digest_of_its_own(prepared, tmp_path, name):
    """A change of its rows went unnoticed."""
    write_comparison(tmp_path)
    split, search, part = (tmp_path / file for file in ("a.jsonl", "b.jsonl", "c.jsonl"))
    rows = search.read_text().splitlines(keepends=True)
    part.write_text("".join(rows[:1]))
    train = tmp_path / "mine.jsonl"

    def digests():
        data = {"train": {"path": str(train), "name": name}, "eval": str(split)}
        return prepared({"data": data, "search": str(search), "parts": {"en": str(part)}})["echo"].digests

    found = []
    for kept in (rows[:20], rows[:19]):
        train.write_text("".join(kept))
        found.append(digests())
    assert set(found[0]) == {name, f"{name} (held out)", "search", "reported", "en"}
    assert [key for key in found[0] if found[0][key] != found[1][key]] == [name]
