"""A command line names one YAML file, and overrides it wherever the file stands."""

import pytest
import yaml

from dora_dist import estimate
from dora_dist.compare.settings import parse_compare
from dora_dist.config.command_line import with_config_option
from dora_dist.config.parse import parse_config

NEEDED = {"output_dir": "run", "model": {"path": "base"}, "data": {"train": "rows.jsonl"}}


@pytest.fixture
def write(tmp_path):
    """Writes a file of this name and these values, and returns its path."""

    def write(name, values):
        (tmp_path / name).write_text(yaml.safe_dump(values))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.yaml", "--seed", "3"], ["--config", "a.yaml", "--seed", "3"]),
        (["--config", "a.yaml", "--seed", "3"], ["--config", "a.yaml", "--seed", "3"]),
        ([], []),
    ],
)
def test_a_configuration_is_the_first_argument_or_an_option(given, expected):
    assert with_config_option(given) == expected


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_second_file_is_refused_by_all_that_reads_one(write, form):
    first = write("first.yaml", {**NEEDED, "preset": "lora", "training": {"max_steps": 5}})
    second = [word.format(write("second.yaml", {"training": {"learning_rate": 1e-4}})) for word in form]
    for read in (
        lambda: parse_config(["--config", first, *second]),
        lambda: parse_compare(["--config", first, *second]),
        lambda: estimate.main([first, *second]),
    ):
        with pytest.raises(ValueError, match=r"^2 configuration files are given \(.*first.*second.*\), but a command "):
            read()


def test_a_file_that_names_another_is_refused(write):
    file = write("run.yaml", {**NEEDED, "config": write("other.yaml", {"seed": 5})})
    with pytest.raises(ValueError, match=r"run\.yaml: config is '.*other\.yaml', but there is one file"):
        parse_config(["--config", file])


@pytest.mark.parametrize("words", [["first.yaml", "other.yaml"], ["--seed", "3", "other.yaml"]])
def test_a_file_that_belongs_to_no_option_is_refused_in_words(write, words):
    file = write("first.yaml", NEEDED)
    with pytest.raises(ValueError, match=r"^other\.yaml belongs to no option: a command takes one YAML file"):
        parse_config(with_config_option([file if word == "first.yaml" else word for word in words]))


@pytest.mark.parametrize("words", [["--config"], ["--config="]])
def test_an_option_without_a_file_is_refused(words):
    with pytest.raises(ValueError, match=r"^--config has no value"):
        parse_config(words)


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_the_command_line_overrides_the_file_wherever_it_stands(write, form):
    sections = {"adapter": {"target_rank": 4}, "training": {"max_steps": 5}, "preset": "paper", "seed": 1}
    file = [word.format(write("run.yaml", {**NEEDED, **sections})) for word in form]
    options = ["--adapter.target_rank", "2", "--training.max_steps=9", "--preset", "lora", "--seed=7"]
    for arguments in ([*options, *file], [*options[:2], *file, *options[2:]], [*file, *options]):
        config = parse_config(arguments)
        assert (config.adapter.target_rank, config.training, config.seed) == (2, {"max_steps": 9}, 7)
        assert (config.preset, config.pruning.rule) == ("lora", "none")
