"""The folder of a run's adapter: as a whole or not there, with all that it says of itself."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.trained_run import TrainedFolder, character_tokenizer, make_base, make_run

from dora_dist.config.parse import load_config
from dora_dist.console import files
from dora_dist.runs import records
from dora_dist.runs.adapter_folder.use import Use
from dora_dist.runs.adapter_folder.writing import write_adapter


@pytest.fixture
def run(tmp_path: Path) -> TrainedFolder:
    """With all that a run records before its adapter is there."""
    made = make_run(tmp_path / "run", make_base(tmp_path / "base"))
    about = files.read_json(made.folder / records.RUN)
    files.write_json(made.folder / records.RUN, {**about, "versions": {"torch": "2"}, "data": {"train": []}})
    return made


def test_an_adapter_is_replaced_as_a_whole_with_card_use_and_tokenizer(run: TrainedFolder) -> None:
    adapter, before = run.folder / "adapter", sorted(path.name for path in run.folder.iterdir())
    (adapter / "stray").touch()
    (run.folder / "adapter.tmp").mkdir()
    (run.folder / "adapter.tmp" / "of_a_run_that_was_killed").touch()
    mask = os.umask(0o027)
    write_adapter(adapter, run.folder, character_tokenizer(), run.model.save_pretrained)
    os.umask(mask)
    assert sorted(path.name for path in run.folder.iterdir()) == before
    names = {path.name for path in adapter.iterdir()}
    assert names >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "dora_dist.json",
        "tokenizer.json",
    }
    assert "stray" not in names
    assert {path.stat().st_mode & 0o777 for path in adapter.iterdir()} == {0o640}
    assert Use.read(adapter).quantization == "nf4"
    assert "rule prune" in ModelCard.load(adapter / "README.md").text


def test_the_card_names_another_method_in_the_place_of_the_configured_one(run: TrainedFolder) -> None:
    write_adapter(run.folder / "adapter", run.folder, character_tokenizer(), run.model.save_pretrained, "PEFT's own")
    text = ModelCard.load(run.folder / "adapter" / "README.md").text
    assert "method         PEFT's own" in text
    assert "rule" not in text


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(run: TrainedFolder) -> None:
    adapter = run.folder / "adapter"
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def fail(folder: Path) -> None:
        run.model.save_pretrained(folder)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_adapter(adapter, run.folder, character_tokenizer(), fail)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_a_base_that_is_gone_costs_its_settings_and_not_the_adapter(
    run: TrainedFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have been moved, or cleaned from a scratch disk, while the run went on."""
    base, adapter = Path(load_config(run.folder / records.CONFIG).model.path), run.folder / "adapter"
    shutil.rmtree(adapter)
    base.rename(base.with_name("moved"))
    write_adapter(adapter, run.folder, character_tokenizer(), run.model.save_pretrained)
    names = {path.name for path in adapter.iterdir()}
    assert names >= {"README.md", "adapter_model.safetensors", "dora_dist.json", "tokenizer.json"}
    assert "generation_config.json" not in names
    assert "rule prune" in ModelCard.load(adapter / "README.md").text
    said = capsys.readouterr().err
    assert "has no generation_config.json, and its card does not say what a server must set" in said
    assert "holds no config.json" in said
