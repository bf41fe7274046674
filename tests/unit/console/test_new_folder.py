"""Folders that appear when they are complete."""

import pytest

from dora_dist.console.files import new_folder, refuse_taken


def test_a_folder_that_another_process_made_in_the_meantime_is_left_as_it_is(tmp_path):
    output = tmp_path / "export"

    def write_beside_another():
        with new_folder(output) as folder:
            (folder / "mine").touch()
            output.mkdir()
            (output / "theirs").touch()

    with pytest.raises(ValueError, match=r"export was made by another process in the meantime"):
        write_beside_another()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "theirs"]


def test_a_folder_below_a_file_is_refused_before_it_is_made(tmp_path):
    refuse_taken(tmp_path / "there" / "is" / "none", "--output")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"OUT is .*/file/x/out, but .*/file is a file: give another folder"):
        refuse_taken(tmp_path / "file" / "x" / "out", "OUT")
