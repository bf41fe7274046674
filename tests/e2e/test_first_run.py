"""A short run as a new user sees it: what it says, what it leaves, and what it refuses with a hint."""

import os
import re
import stat

import pytest
from safetensors.torch import load_file, save_file
from support.forked_run import log_of, run_forked, run_to_the_end
from support.tiny_run import write_config

from dora_dist.console.files import read_lines

BANNER = r"""model   {folder}/model \(nf4\), 14 adapted layers
data    50 of train; 10 held out
steps   6 of about \d+ tokens, on 2 processes
memory  recomputes the activations of 0 of 2 layers in the backward pass
budget  56 components, 28 in the end: like LoRA of rank 2, scale 1\.33
folder  {folder}/run
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    config = write_config(
        folder,
        adapter={"alpha": 16 / 3},
        pruning={"interval": "auto"},
        training={"max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 3, "report_to": ["tensorboard"]},
    )
    text = config.read_text().replace("  logging_steps: 1\n", "")
    config.write_text(text)
    run_to_the_end(config, folder / "run", folder / "log")
    return folder


def test_it_says_what_it_is_once_and_nothing_that_means_nothing(short):
    text = log_of(short / "log")
    assert len(re.findall(BANNER.format(folder=short), text)) == 1, text
    assert text.count("warning: pruning.interval 1 gives 3 pruning events in 6 steps") == 1
    for noise in ("it/s]", "mismatch", "FutureWarning", "UserWarning", "\r"):
        assert noise not in text


def test_it_logs_its_steps(short):
    lines = [line for line in read_lines(short / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    (tokens,) = re.findall(r"steps   6 of about (\d+) tokens", log_of(short / "log"))
    of_steps = [line["tokens_per_second"] * line["seconds_per_step"] for line in lines]
    assert sum(of_steps) / 6 == pytest.approx(int(tokens), abs=1)
    assert all(2**20 < line["peak_memory_bytes"] < 2**40 for line in lines)
    assert len(re.findall(r" s/step  [\d,]+ tokens/s  [\d.]+ min left", log_of(short / "log"))) == 6


def test_it_leaves_its_page_and_the_scores_of_its_events(short):
    assert "run ended, at step 6 of 6." in (short / "run" / "report.html").read_text()
    assert f"  {'page':<16} {short}/run/report.html\n" in log_of(short / "log")
    events = read_lines(short / "run" / "allocation.jsonl")
    assert all(event["scores"].keys() == event["kept"].keys() for event in events)
    assert min(events[-1]["scores"].values()) > 0


def test_its_files_follow_the_umask(short):
    exported = run_forked("export", str(short / "run"), "--format", "merged", "--output", str(short / "merged"))
    assert exported.status == 0, exported.output
    (short / "probe").touch()
    usual = stat.S_IMODE((short / "probe").stat().st_mode)
    assert usual & 0o044 == 0o044, "the tests run under an ordinary umask"
    modes = {
        str(path.relative_to(short)): stat.S_IMODE(path.stat().st_mode)
        for folder in ("run", "merged")
        for path in (short / folder).rglob("*")
        if path.is_file()
    }
    assert [name for name in modes if name.endswith(".safetensors")]
    assert {name: oct(mode) for name, mode in modes.items() if mode != usual} == {}


def test_its_adapter_is_no_model_and_says_whose_it_is(short):
    config = str(short / "run.yaml")
    for command in (("train", config, "--dry-run"), ("prepare", config)):
        finished = run_forked(*command, "--model.path", str(short / "run" / "adapter"))
        assert finished.status == 2, finished.output
        (line,) = (line for line in finished.output.splitlines() if line.startswith("error: "))
        assert f"adapter' holds an adapter and no model; its base is {short}/model: set model.path to the base" in line


@pytest.mark.parametrize(("value", "quantization"), [("nan", "nf4"), ("inf", "none"), ("-inf", "int8")])
def test_a_base_with_values_that_are_not_finite_is_refused_before_training(tmp_path, value, quantization):
    config = write_config(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    spoilt = "model.layers.1.mlp.up_proj.weight"
    weights[spoilt][3, 5] = float(value)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    finished = run_forked("train", str(config), "--distributed.engine", "none", "--model.quantization", quantization)
    assert finished.status == 2, finished.output
    (line,) = (line for line in finished.output.splitlines() if line.startswith("error: "))
    assert f"has values that are not finite (NaN or infinite) in {spoilt}: copy or download" in line
    assert not (tmp_path / "run").exists(), os.listdir(tmp_path / "run")


def test_a_report_on_no_folder_says_that_there_is_none(tmp_path):
    finished = run_forked("report", str(tmp_path / "elsewhere"))
    assert finished.status == 2
    assert f"error: there is no folder {tmp_path}/elsewhere: give the output_dir of a run" in finished.output
