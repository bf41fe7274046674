"""What an earlier start has left, and the accumulation that keeps its global batch."""

from pathlib import Path

import pytest
from support.tiny_run import some_fingerprint

from dora_dist.config.data import DataConfig
from dora_dist.config.format_version import FORMAT_VERSION
from dora_dist.config.model import ModelConfig
from dora_dist.config.run import RunConfig
from dora_dist.console.files import write_json
from dora_dist.runs import resume
from dora_dist.runs.records import OF_CELL, RUN, SUMMARY
from dora_dist.runs.resume import Earlier

FOLDER = Path("runs/x/checkpoint-5")


def config(**training):
    return RunConfig(output_dir="x", model=ModelConfig(path="m"), data=DataConfig(train="t"), training=training)


def earlier(world_size, batch):
    return Earlier(
        folder=FOLDER, checkpoint=FOLDER, world_size=world_size, fingerprint=some_fingerprint(global_batch=batch)
    )


def test_the_configured_accumulation_holds_where_nothing_was_before_or_the_ranks_are_as_many():
    assert resume.accumulation(Earlier(folder=FOLDER), config(), 4) is None
    assert resume.accumulation(earlier(4, 64), config(), 4) is None


@pytest.mark.parametrize(
    ("world_size", "per_process", "expected"), [(1, 2, 8), (2, 2, 4), (8, 2, 1), (4, 4, 1), (16, 1, 1)]
)
def test_the_accumulation_keeps_the_global_batch(world_size, per_process, expected):
    found = resume.accumulation(earlier(3, 16), config(per_device_train_batch_size=per_process), world_size)
    assert found == expected


def test_the_trainers_default_batch_is_known():
    assert resume.accumulation(earlier(1, 32), config(), 2) == 2


@pytest.mark.parametrize(
    ("world_size", "per_process", "hint"),
    [
        (4, 8, "set training.per_device_train_batch_size to one of 1, 2, 4"),
        (3, 1, "use a number of processes that divides it"),
        (32, 1, "use a number of processes that divides it"),
    ],
)
def test_a_batch_that_cannot_be_had_is_refused_with_what_could(world_size, per_process, hint):
    with pytest.raises(ValueError, match=f"by 2 processes with a global batch of 16, .*{hint}"):
        resume.accumulation(earlier(2, 16), config(per_device_train_batch_size=per_process), world_size)


def finished_run(folder, version=FORMAT_VERSION, **changes):
    about = {} if version == 1 else {"format": version}
    write_json(folder / RUN, {**about, "settings": some_fingerprint(**changes).as_dict(), "processes": 2})
    write_json(folder / SUMMARY, {})
    return folder


def test_a_finished_run_is_known_by_its_settings(tmp_path):
    assert not resume.look(tmp_path, "auto").finished
    found = resume.look(finished_run(tmp_path), "auto")
    assert found.finished
    assert found.world_size == 2
    resume.check_settings(found, some_fingerprint(adapter={"target_modules": ("q_proj",)}))


def test_a_finished_run_that_has_lost_its_record_is_not_taken_for_one(tmp_path):
    (finished_run(tmp_path) / RUN).unlink()
    with pytest.raises(ValueError, match=r"holds summary.json, but neither run.json nor a complete checkpoint"):
        resume.look(tmp_path, "auto")


def test_a_finished_run_is_not_taken_for_the_result_of_other_settings(tmp_path):
    found = resume.look(finished_run(tmp_path), "auto")
    with pytest.raises(
        ValueError, match=r"settings: optimizer steps was 10 and is now 20; seed was 1 and is now 2\. R"
    ):
        resume.check_settings(found, some_fingerprint(seed=2, num_steps=20))


@pytest.mark.parametrize("seed", [1, 2])
def test_what_an_earlier_version_wrote_is_not_resumed_and_what_changed_is_said(tmp_path, seed):
    found = resume.look(finished_run(tmp_path, version=1), "auto")
    changed = "none" if seed == 1 else "seed was 1 and is now 2"
    with pytest.raises(ValueError, match=rf"format 1; .*format {FORMAT_VERSION} only.* changed: {changed}\. Finish"):
        resume.check_settings(found, some_fingerprint(seed=seed))


def test_what_a_later_version_wrote_is_not_resumed_and_not_called_earlier(tmp_path):
    found = resume.look(finished_run(tmp_path, version=FORMAT_VERSION + 1), "auto")
    with pytest.raises(ValueError, match=rf"later version of dora-dist \(format {FORMAT_VERSION + 1}; .* update dora"):
        resume.check_settings(found, some_fingerprint())


@pytest.mark.parametrize("name", ["adapter", "config.yaml", "checkpoint-500"])
def test_a_folder_that_is_not_a_runs_is_not_written_into(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name}, but neither run.json nor a complete checkpoint: .*new folder"):
        resume.look(tmp_path, "auto")
    write_json(tmp_path / RUN, {"settings": {}})
    assert resume.look(tmp_path, "auto").checkpoint is None


def test_files_of_others_are_not_written_beside(tmp_path):
    for name in ("a.txt", "b.txt", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds a\.txt, b\.txt, c and 1 more, but .* Set output_dir to a new"):
        resume.look(tmp_path, "auto")
    write_json(tmp_path / RUN, {"settings": {}})
    assert resume.look(tmp_path, "auto").checkpoint is None


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run, which is a file: set output_dir to a folder"):
        resume.refuse_foreign_folder(tmp_path / "run")


@pytest.mark.parametrize("name", [".gitignore", "claim-3.json", "run.json.tmp", *OF_CELL])
def test_hidden_files_and_what_a_run_or_a_comparison_begins_with_are_no_matter(tmp_path, name):
    (tmp_path / name).touch()
    assert resume.look(tmp_path, "auto").checkpoint is None
