"""Folders that appear when they are complete."""

import pytest

from dora_dist.console.files import new_folder


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
