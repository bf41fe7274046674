"""Notes that ranks leave of how they ended."""

import json
import os

from dora_dist.console.notes import ERROR_FILE, NOTES, Note, leave_note, read_notes


def test_a_note_is_left_for_the_starter_and_quoted_by_torchs_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv(NOTES, f"{os.getppid()} {tmp_path}")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.txt"))
    monkeypatch.setenv("RANK", "3")
    assert leave_note(Note(2, "error: it is wrong"))
    assert read_notes(tmp_path) == {3: Note(2, "error: it is wrong")}
    quoted = json.loads((tmp_path / "error.txt").read_text())
    assert quoted["message"]["extraInfo"]["py_callstack"] == "error: it is wrong"


def test_without_a_starter_the_rank_prints_it(monkeypatch):
    monkeypatch.delenv(NOTES, raising=False)
    monkeypatch.delenv(ERROR_FILE, raising=False)
    assert not leave_note(Note(1, "x"))


def test_a_note_that_cannot_be_written_does_not_keep_a_process_from_ending(tmp_path, monkeypatch):
    monkeypatch.setenv(NOTES, f"{os.getppid()} {tmp_path / 'gone'}")
    monkeypatch.setenv("RANK", "0")
    assert not leave_note(Note(1, "x"))


def test_a_rank_whose_starter_is_gone_prints_it_itself(tmp_path, monkeypatch):
    monkeypatch.setenv(NOTES, f"{os.getpid()} {tmp_path}")  # not the parent of this process
    monkeypatch.setenv("RANK", "0")
    assert not leave_note(Note(1, "x"))
    assert read_notes(tmp_path) == {}
