"""``data.eval: 5%``: which rows of the training sources are held out."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import tiny_tokenizer

from dora_dist.config.data import DataConfig
from dora_dist.data.prepared import PreparedSource
from dora_dist.data.reading.files import digest_of
from dora_dist.setup.run_data import RunData, prepare_data


def pair(number: int) -> dict[str, Any]:
    """Rows that differ, also as the tokenizer has them, which knows w0 to w11."""
    return {"prompt": " ".join(f"w{digit}" for digit in f"{number:04}"), "completion": "w9"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(*paths: Path | dict[str, Any], share: str = "20%", **settings: Any) -> RunData:
    cache = str(Path(str(paths[0]["path"] if isinstance(paths[0], dict) else paths[0])).parent / "cache")
    train = [path if isinstance(path, dict) else str(path) for path in paths]
    return prepare_data(
        DataConfig(train=train, eval=share, cache_dir=cache, **{"workers": 1, **settings}), tiny_tokenizer()
    )


def prompts(source: PreparedSource) -> list[str]:
    """The words that :func:`pair` has made the prompt of."""
    return [
        tiny_tokenizer().decode(row["input_ids"][: row["spans"][0]], skip_special_tokens=True) for row in source.dataset
    ]


def test_both_sides_together_are_all_rows_each_once_and_the_share_is_about_as_asked(tmp_path):
    rows = [pair(number) for number in range(1000)]
    data = prepare(write(tmp_path / "rows.jsonl", rows))
    (train,), (held_out,) = data.train, data.evaluation
    assert sorted(prompts(train) + prompts(held_out)) == sorted(row["prompt"] for row in rows)
    assert 150 < held_out.counts.rows < 250
    assert data.overlap == {"rows": 0}
    assert any(f"rows: {held_out.counts.rows} of 1,000 rows are held out (data.eval 20%)" in n for n in data.notes)


def test_a_file_of_which_both_sides_are_asked_for_is_hashed_once_until_it_changes(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair(number) for number in range(50)])
    known = digest_of.cache_info().misses
    first = prepare(path)
    again = prepare(path)
    assert digest_of.cache_info().misses == known + 1
    assert [source.folder for source in again.train] == [source.folder for source in first.train]
    about = path.stat()
    write(path, [pair(number) for number in range(50, 100)])
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert path.stat().st_size == about.st_size
    changed = prepare(path)
    assert digest_of.cache_info().misses == known + 2
    assert not {*prompts(changed.train[0])} & {*prompts(first.train[0])}


def test_no_row_moves_when_others_are_added_before_between_and_behind_or_all_are_shuffled(tmp_path):
    rows = [pair(number) for number in range(300)]
    before = prepare(write(tmp_path / "rows.jsonl", rows[:200]))
    random.Random(0).shuffle(rows)
    after = prepare(write(tmp_path / "rows.jsonl", rows))
    for part in ("train", "evaluation"):
        (then,), (now,) = getattr(before, part), getattr(after, part)
        assert set(prompts(then)) < set(prompts(now))


def test_a_larger_share_holds_out_what_a_smaller_one_does(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair(number) for number in range(200)])
    small, large = (prepare(path, share=share).evaluation[0] for share in ("7.5%", "30%"))
    assert set(prompts(small)) < set(prompts(large))


def test_rows_that_say_the_same_are_on_one_side_whatever_else_they_have_and_whichever_file_they_are_in(tmp_path):
    rows = [pair(number) for number in range(100)]
    doubled = [{"number": n, **dict(reversed(row.items()))} for n, row in enumerate([*rows, *rows])]
    data = prepare(write(tmp_path / "a.jsonl", doubled), write(tmp_path / "b.jsonl", rows))
    assert data.overlap == {"a": 0, "b": 0}
    first, second = data.evaluation
    assert prompts(first) == prompts(second) * 2


def exchange(row: dict[str, Any], **marks: Any) -> list[dict[str, Any]]:
    question, answer = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})
    return [{**question, **marks}, answer]


SAME = {
    "fields of other names": (
        lambda row, n: {"input": row["prompt"], "output": row["completion"]},
        {"fields": {"prompt": "input", "completion": "output"}},
    ),
    "messages": (lambda row, n: {"messages": exchange(row)}, {}),
    "messages with a key that is not read": (lambda row, n: {"messages": exchange(row, id=f"m{n}", weight=1)}, {}),
    "parts of text": (
        lambda row, n: {
            "messages": [
                {**message, "content": [{"type": "text", "text": message["content"]}]} for message in exchange(row)
            ]
        },
        {},
    ),
    "sharegpt": (
        lambda row, n: {
            "conversations": [
                {"from": "human", "value": row["prompt"]},
                {"from": "gpt", "value": row["completion"]},
            ]
        },
        {},
    ),
    "alpaca": (lambda row, n: {"output": row["completion"], "instruction": row["prompt"], "input": ""}, {}),
    "a prompt of its own": (
        lambda row, n: {"question": row["prompt"], "completion": row["completion"], "n": n},
        {"prompt": "w1 {question} w2"},
    ),
}


@pytest.mark.parametrize("written", SAME)
def test_rows_that_say_the_same_are_on_one_side_however_they_are_written(tmp_path, written):
    rows = [pair(number) for number in range(100)]
    make, settings = SAME[written]
    other = write(tmp_path / "b.jsonl", [make(row, number) for number, row in enumerate(rows)])
    data = prepare(write(tmp_path / "a.jsonl", rows), {"path": str(other), **settings}, as_chat=True)
    first, second = ([place.rsplit(" ", 1)[1] for place in source.dataset["place"]] for source in data.evaluation)
    assert first == second
    assert 10 < len(first) < 30


def test_what_a_prompt_of_its_own_and_renamed_fields_read_decides(tmp_path):
    rows = [{"topic": pair(n)["prompt"], "reply": "w9"} for n in range(300)]
    source = {"path": str(write(tmp_path / "rows.jsonl", rows * 2)), "fields": {"completion": "reply"}}
    data = prepare({**source, "prompt": "w1 {topic}"})
    assert data.overlap == {"rows": 0}
    assert len(set(prompts(data.evaluation[0]))) == data.evaluation[0].counts.rows / 2 > 20


def test_rows_that_cannot_be_used_are_counted_once(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair(number) for number in range(100)])
    with path.open("a") as file:
        file.write("{no json\n[1]\n")
    data = prepare(path, bad_rows="skip")
    assert data.train[0].counts.bad == 2
    assert data.evaluation[0].counts.bad == 0


def test_a_small_source_may_hold_out_nothing_and_says_so(tmp_path):
    number = next(n for n in range(100) if not held_out_alone(tmp_path, n))
    large = write(tmp_path / "large.jsonl", [pair(n) for n in range(100)])
    data = prepare(large, write(tmp_path / "small.jsonl", [pair(number)]))
    assert [source.name for source in data.train] == ["large", "small"]
    assert [source.name for source in data.evaluation] == ["large"]
    assert "small: 0 of 1 rows are held out (data.eval 20%)" in data.notes


def held_out_alone(folder: Path, number: int) -> bool:
    """Whether a row is held out, as the only one of its source."""
    other = write(folder / "others.jsonl", [pair(n) for n in range(100, 200)])
    data = prepare(other, write(folder / "one.jsonl", [pair(number)] * 2 + [pair(n) for n in range(200, 300)]))
    return pair(number)["prompt"] in prompts(data.evaluation[1])


@pytest.mark.parametrize("side", ["train", "eval"])
def test_a_side_without_any_row_is_refused_with_the_share_as_the_knob(tmp_path, side):
    number = next(n for n in range(100) if held_out_alone(tmp_path, n) == (side == "train"))
    message = {
        "train": r"^rows has no rows on the side that is trained on \(data.eval is 20%\): lower the share",
        "eval": r"^data.eval is 20%, which holds out no row that can be used \(rows has 1\): raise the share",
    }
    with pytest.raises(ValueError, match=message[side]):
        prepare(write(tmp_path / "rows.jsonl", [pair(number)]))


@pytest.mark.parametrize("share", ["0%", "-5%", "50%", " 120 %"])
def test_a_share_of_nothing_or_of_half_and_more_is_refused(share):
    with pytest.raises(ValueError, match=r"^data.eval is .*%, but must be more than 0% and less than 50%"):
        DataConfig(train="rows.jsonl", eval=share)


def test_a_share_stands_alone():
    for given in (["5%", "held.jsonl"], {"path": "5%"}):
        with pytest.raises(ValueError, match=r"^data.eval\[0\].path is '5%', but must name a file: a share .* alone"):
            DataConfig(train="rows.jsonl", eval=given)


@pytest.mark.parametrize(("share", "percent"), [(".5%", 0.5), ("5.%", 5.0), ("+5 %", 5.0)])
def test_a_share_may_be_written_as_any_number(share, percent):
    assert DataConfig(train="train.jsonl", eval=share).eval_share == pytest.approx(percent / 100)


@pytest.mark.parametrize("share", ["5,5%", "five %", "1e-3%", "5", "0.05"])
def test_what_looks_like_a_share_and_is_none_is_no_file(share):
    with pytest.raises(ValueError, match=f"data.eval is '{share}', which is no share: write it as 5% or 0.5%"):
        DataConfig(train="train.jsonl", eval=share)
