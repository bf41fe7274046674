"""Folders of runs that earlier versions wrote: they can be looked at and used, and are not resumed."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import PartialState
from peft import PeftModel
from support.repository import REPOSITORY
from support.tiny_run import save_tiny_model, write_rows
from support.trained_run import one_thread

from dora_dist import report
from dora_dist.adapter.plain_lora import read_lora_adapter
from dora_dist.config.format_version import FORMAT_VERSION
from dora_dist.config.parse import load_config
from dora_dist.console.files import read_json
from dora_dist.export import __main__ as export
from dora_dist.generate.__main__ import main as generate
from dora_dist.runs import records, resume
from dora_dist.runs.trained_run import open_run
from dora_dist.setup import resolve, run_data

FIRST = REPOSITORY / "tests" / "earlier_versions" / "73e868c"


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the run of 73e868c, with the base and the data that it was made from."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIRST / "run", "run")
    shutil.copy(FIRST / "run.yaml", "run.yaml")
    save_tiny_model(Path("model"))
    write_rows(Path("train.jsonl"), 50, seed=1)
    write_rows(Path("eval.jsonl"), 10, seed=2)
    return Path("run")


def test_its_report_says_what_it_said_then(run, capsys):
    written = read_json(run / records.SUMMARY)
    report.main([str(run)])
    now = read_json(run / records.SUMMARY)
    assert {name: now[name] for name in written} == written
    assert f"{written['components_at_start']} -> {written['components_kept']}" in capsys.readouterr().out


def test_it_generates(run, capsys):
    generate([str(run), "--prompt", "w1 w2", "--input", "w5 w6", "--max-new-tokens", "3"])
    assert "--- adapter" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["peft", "compact", "merged"])
@pytest.mark.parametrize("checkpoint", [(), ("--checkpoint", "checkpoint-12")])
def test_it_is_exported(run, kind, checkpoint):
    export.main([str(run), "--format", kind, "--output", "out", *checkpoint])
    if kind == "peft":
        base = open_run(run).load_base("cpu", in_float32=True)
        modules = PeftModel.from_pretrained(base, "out").peft_config["default"].target_modules
        trained = read_json(run / records.SUMMARY)["ranks"].keys()
        # What servers compute together with them has zeros.
        assert set(modules) - trained == {name for name in modules if name.endswith(("k_proj", "v_proj"))}
        assert trained <= set(modules)


def test_its_adapter_has_the_ranks_of_its_records_and_is_padded_in_an_export(run):
    ranks = {name: len(lora_a) for name, (lora_a, _) in read_lora_adapter(run / "adapter").items()}
    assert ranks == read_json(run / records.SUMMARY)["ranks"]
    export.main([str(run), "--format", "peft", "--output", "out"])
    assert {name: len(lora_a) for name, (lora_a, _) in read_lora_adapter(Path("out")).items()} == ranks
    assert read_json(Path("out") / "adapter_config.json")["r"] == 8


def test_it_is_not_resumed_and_the_settings_that_changed_are_named(run):
    PartialState()
    (run / records.SUMMARY).unlink()  # as if the run had not come to its end
    config = load_config("run.yaml", ["--seed", "4"])
    resolved = resolve.resolve_run(config, *run_data.read_data(config))
    for earlier in (resume.look(run, "auto"), resume.look(run, str(run / "checkpoint-12"))):
        with pytest.raises(
            ValueError, match=rf"format 1; .* resumes format {FORMAT_VERSION} only.*; seed was 3 and is"
        ):
            resume.check_settings(earlier, resolved.fingerprint)


def test_its_configuration_starts_a_run_of_this_version(run):
    config = load_config(run / records.CONFIG, ["--output_dir", "new"])
    assert config.pruning.interval == 2
    assert json.loads((FIRST / "run" / "run.json").read_text())["settings"]["pruning.interval"] == 2


def test_a_configuration_of_a_later_version_is_refused_before_its_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: x\nformat_version: {FORMAT_VERSION + 1}\nbrand_new: 3\nseed: null\n")
    with pytest.raises(ValueError, match=f"format_version {FORMAT_VERSION + 1}.*reads formats up to {FORMAT_VERSION}"):
        load_config(path)
