"""Presets: defaults under one name, which keys of the run's own change."""

import pytest
import yaml

from dora_dist.config.parse import config_of, config_text, parse_config

NEEDED = {"output_dir": "run", "model": {"path": "base"}, "data": {"train": "rows.jsonl"}}


@pytest.fixture
def given(tmp_path):
    """Parses a configuration of these values, with options on top."""

    def parse(values, *options):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**NEEDED, **values}))
        return parse_config(["--config", str(path), *options])

    return parse


def test_a_preset_gives_the_keys_that_are_not_given(given):
    config = given({"preset": "lora", "adapter": {"train_gates": True, "target_rank": 4}})
    assert (config.pruning.rule, config.adapter.train_gates, config.adapter.start_rank) == ("none", True, 4)


def test_the_default_starts_from_data_and_prunes_early_by_what_the_loss_says(given):
    """A preset never changes once it is released."""
    config = given({})
    adapter, pruning = config.adapter, config.pruning
    assert (config.preset, adapter.init, adapter.train_gates, adapter.start_rank) == ("2026-11", "inputs", True, 12)
    assert (pruning.rule, pruning.importance, pruning.budget_unit) == ("prune", "gate_sensitivity", "parameters")
    assert (pruning.warmup_fraction, pruning.final_fraction, pruning.equilibrium_weight) == (0.04, 0.9, 0.0)
    assert config_of(NEEDED) == config


def test_an_option_wins_over_the_file(given):
    assert given({"preset": "paper"}, "--preset", "lora").pruning.rule == "none"
    assert given({"preset": "lora"}, "--preset=paper").pruning.rule == "prune"


def test_a_program_can_choose_one():
    assert config_of({**NEEDED, "preset": "lora"}).pruning.rule == "none"


def test_what_a_run_has_saved_means_the_same_without_its_preset(given, tmp_path):
    config = given({"preset": "lora"})
    (tmp_path / "saved.yaml").write_text(config_text(config))
    assert parse_config(["--config", str(tmp_path / "saved.yaml")]) == config
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved["pruning"]["rule"] == "none"
    assert saved["adapter"]["initial_rank"] == config.adapter.target_rank


def test_another_preset_on_top_of_a_saved_configuration_is_refused(given, tmp_path):
    (tmp_path / "saved.yaml").write_text(config_text(given({"preset": "lora"})))
    with pytest.raises(ValueError, match="was written by a run and sets every key, from preset lora"):
        parse_config(["--config", str(tmp_path / "saved.yaml"), "--preset", "paper"])


def test_a_file_of_a_run_from_before_there_were_presets_is_the_papers(given):
    assert given({"format_version": 2}).preset == "paper"


def test_an_unknown_preset_is_refused_with_the_nearest(given):
    for parse in (lambda: given({"preset": "loar"}), lambda: given({}, "--preset", "loar")):
        with pytest.raises(
            ValueError, match=r"preset is loar, but must be one of 2026-11, paper, lora.*did you mean lora"
        ):
            parse()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"preset": "lora", "adapter": {"initial_rank": 12}}, "pruning.rule is none.*adapter.initial_rank is 12"),
        ({"adapter": {"ranks": "mlp-only"}}, "adapter.ranks is mlp-only.*but pruning.rule is prune: set it to none"),
        ({"adapter": {"ranks": "mlp-only", "initial_rank": 12}}, "ranks is mlp-only.*initial_rank is 12"),
        ({"training": {"lora_plus_ratio": 0}}, "training.lora_plus_ratio is 0, but must be positive"),
        ({"training": {"lora_plus_ratio": "x"}}, "training.lora_plus_ratio is 'x', but must be a number"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given, values, says):
    with pytest.raises(ValueError, match=says):
        given(values)
