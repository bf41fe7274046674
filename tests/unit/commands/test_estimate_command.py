"""``dora-dist estimate`` where the data of the configuration can be read, and where they cannot."""

import json
import re
import shutil

import pytest
from support.tiny_run import write_config

from dora_dist import estimate
from dora_dist.config.parse import load_config
from dora_dist.memory.estimate import estimate_memory


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A configuration with rows of up to 25 tokens, and no weights."""
    path = write_config(tmp_path_factory.mktemp("estimate"), distributed={"engine": "none"})
    (path.parent / "model" / "model.safetensors").unlink()
    return path


@pytest.fixture
def said(written, capsys):
    """What the command prints, on standard output and standard error."""

    def run(*arguments):
        estimate.main([str(written), *map(str, arguments)])
        return capsys.readouterr()

    return run


def figures(said, *arguments):
    return json.loads(said("--json", *arguments).out)


def test_rows_are_those_of_the_data(said):
    printed = said().out
    assert "at most 100 tokens per micro-batch (4 x 25)" in printed
    assert "\nRows of the longest example, 25 tokens.\nRows of the median length, 17 tokens: a peak of " in printed


def test_the_peaks_are_those_of_rows_of_these_lengths(written, said):
    found = figures(said)
    assert (found["length"], found["typical"]["length"]) == (25, 17)
    for length, peak in ((25, found["peak_bytes"]), (17, found["typical"]["peak_bytes"])):
        assert estimate_memory(load_config(written, ["--data.max_length", str(length)]), 1).peak_bytes == peak


def test_the_data_are_encoded_once(written, said, tmp_path):
    cache = ("--data.cache_dir", tmp_path)
    assert "train: encoding 50 rows" in said(*cache).err
    assert "encoding" not in said(*cache).err
    assert "encoding" not in said("--data.cache_dir", tmp_path / "other", "--without-data").err
    assert not (tmp_path / "other").exists()


def limits(written):
    return estimate_memory(load_config(written, ["--data.max_length", "200"]), 1).peak_bytes


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--without-data",), "--without-data was given"),
        (("--data.train", "nothing.jsonl"), "no data file matches 'nothing.jsonl'"),
        (("--model.path", "bare"), "'bare' holds no tokenizer that can be read"),
    ],
)
def test_without_data_rows_are_as_long_as_they_may_be_and_it_says_why(
    written, said, arguments, why, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copy(written.parent / "model" / "config.json", tmp_path / "bare")
    found = figures(said, "--data.max_length", 200, *arguments)
    assert found["rows_are"].startswith("Rows of data.max_length, 200 tokens, because the data were not read: ")
    assert why in found["rows_are"]
    assert (found["length"], found["peak_bytes"], found["typical"]) == (200, limits(written), None)


def test_packed_rows_are_full_whatever_the_data(written, said):
    found = figures(said, "--data.max_length", 200, "--data.batching", "packed")
    assert found["rows_are"] == "Rows are packed up to data.max_length, 200 tokens."
    assert (found["length"], found["typical"]) == (200, None)


def test_time_is_said_where_a_speed_is_given_and_only_there(said):
    assert "Time: " not in said().out
    found = figures(said, "--tokens-per-second", 0.5)["time"]
    assert found["steps"] == 12
    # 48 of the 50 examples, of which all have 850 tokens.
    assert 850 - 2 * 25 <= found["tokens"] < 850
    assert found["seconds"] == found["tokens"] / 0.5
    line = said("--tokens-per-second", 0.5).out.splitlines()[-1]
    assert re.fullmatch(
        rf"Time: about 2\d min (\d+ s )?for 12 optimizer steps of {found['tokens']} tokens in all, at 0\.5 tokens/s "
        r"\(--tokens-per-second\)\.",
        line,
    )


def test_the_time_grows_with_the_passes_over_the_data(said):
    epochs = ("--training.max_steps", -1, "--training.num_train_epochs")
    once, thrice = (figures(said, "--tokens-per-second", 10, *epochs, number)["time"] for number in (1, 3))
    assert (once["steps"], thrice["steps"]) == (13, 38)
    assert 2.5 < thrice["seconds"] / once["seconds"] < 3.1


def test_a_run_in_the_same_folder_shows_its_speed(said, tmp_path):
    lines = [{"step": step, "epoch": step * 4 / 50, "seconds_per_step": 34.0} for step in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"per_epoch": 50, "examples": 50, "tokens": 850}
    (tmp_path / "run.json").write_text(json.dumps({"data": {"train": [source]}, "processes": 2}))
    found = figures(said, "--output_dir", tmp_path)["time"]
    # 4 rows of 17 tokens a step.
    assert found["speed"] == {"tokens_per_second": pytest.approx(2.0), "origin": f"seen in {tmp_path}, on 2 processes"}
    assert figures(said, "--output_dir", tmp_path, "--tokens-per-second", 5)["time"]["speed"]["tokens_per_second"] == 5
    assert figures(said, "--output_dir", tmp_path, "--without-data")["time"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens-per-second", "0"), "--tokens-per-second is 0, but must be above 0, and finite"),
        (("--tokens-per-second", "inf"), "--tokens-per-second is inf, but must be above 0, and finite"),
        (("--tokens-per-second", "7", "--without-data"), "--tokens-per-second is 7, but --without-data leaves unknown"),
        (
            ("--tokens-per-second", "7", "--training.per_device_train_batch_size", "60"),
            "50 training examples do not fill one global batch of 60",
        ),
    ],
)
def test_what_gives_no_time_is_refused(said, arguments, message):
    with pytest.raises(ValueError, match=message):
        said(*arguments)
