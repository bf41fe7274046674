"""A model is fetched only when somebody has agreed, and what goes wrong is one message."""

import json
from pathlib import Path

import pytest

from dora_dist.console.errors import ExpectedRunError
from dora_dist.quickstart import __main__ as quickstart
from dora_dist.quickstart.folder import SMOLLM2, ensure_quickstart


def test_nothing_is_fetched_without_an_answer(tmp_path: Path):
    with pytest.raises(ValueError, match="add --yes"):
        quickstart.main(["--model", "smollm2", "--output", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="--model tiny generates one"):
        ensure_quickstart(tmp_path / "out", model=SMOLLM2, may_fetch=lambda: False)
    assert not list(tmp_path.iterdir())


def test_what_pip_cannot_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())
    with pytest.raises(ExpectedRunError, match=r"pip could not fetch them: ERROR: .*PIP_INDEX_URL"):
        ensure_quickstart(tmp_path / "out", model=SMOLLM2, may_fetch=lambda: True)
    assert not list(tmp_path.iterdir())


def test_the_first_answers_are_shown_as_they_were_before_and_after(tmp_path: Path):
    assert quickstart.first_answers(tmp_path) == ""
    lines = [(0, 3, "base\nsays"), (0, 4, "other"), (9, 3, "tuned says"), (9, 4, "other")]
    rows = [{"step": step, "number": number, "prompt": "ask", "answer": answer} for step, number, answer in lines]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [" ".join(line.split()) for line in quickstart.first_answers(tmp_path).splitlines()]
    assert shown == ["", "The first held-out example:", "prompt ask", "base base", "says", "tuned tuned says"]
