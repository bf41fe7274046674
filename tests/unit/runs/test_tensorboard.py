"""Where a run's TensorBoard is."""

import os

from transformers import TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from dora_dist.runs.trackers import TENSORBOARD_VARIABLE, TrackedRun, Trackers


def test_it_is_in_the_run_s_folder_also_with_a_variable_that_names_another_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(TENSORBOARD_VARIABLE, str(tmp_path / "elsewhere"))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    folder, callback = tmp_path / "run", TensorBoardCallback()
    with Trackers() as trackers:
        trackers.start(["tensorboard"], TrackedRun(folder=folder, config={"seed": 1}, arguments=arguments, known_as={}))
        trackers.attach([callback])
        callback.tb_writer.close()
        callback._init_summary_writer(arguments)  # as it does for what is logged when training has ended
        callback.tb_writer.add_scalar("late", 1.0)
    assert len(list((folder / "tensorboard").iterdir())) >= 1
    assert not (tmp_path / "elsewhere").exists()
    assert os.environ[TENSORBOARD_VARIABLE] == str(tmp_path / "elsewhere")
    assert f"{TENSORBOARD_VARIABLE} is {tmp_path / 'elsewhere'}, which a run does not follow" in capsys.readouterr().err
