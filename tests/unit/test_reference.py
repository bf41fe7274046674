"""The pages that are made from the code are as the code is, and each key of the configuration has a meaning there."""

import dataclasses
from typing import get_type_hints

import pytest
import reference
from support.repository import REPOSITORY

from dora_dist.config.presets import DEFAULT, PRESETS
from dora_dist.config.run import RunConfig
from dora_dist.console.command import INTERRUPTED
from dora_dist.console.errors import PREEMPTED


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_says(name):
    assert (REPOSITORY / "docs" / name).read_text() == reference.page(name), "run: python docs/reference.py"


def test_every_key_is_there_with_a_meaning():
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    hints = get_type_hints(RunConfig)
    keys = [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(hints[section.name])
        for key in dataclasses.fields(hints[section.name])
    ]
    assert len(keys) > 60
    for key in keys:
        row = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")][-1]  # after that of the presets
        assert len(row.split(" | ")[3]) > 15, row


def test_the_default_preset_is_that_of_a_configuration_file():
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert f"| `{DEFAULT}` | defaults of the sections" in text
    init = f"`{PRESETS[DEFAULT]['adapter.init']}`"
    assert f"| `{DEFAULT}` (default) | `paper` | `lora` |\n|---|---|---|---|\n| `adapter.init` | {init} |" in text
    of_files = [line for line in text.splitlines() if line.startswith("| `adapter.init` |")][-1]
    assert f" | {init} | initial values of" in of_files


def test_a_changed_docstring_makes_the_page_differ(monkeypatch):
    before = reference.page("configuration.md")
    monkeypatch.setattr(RunConfig, "__doc__", (RunConfig.__doc__ or "").replace("random seed of", "seed of"))
    assert reference.page("configuration.md") != before


def test_exit_statuses_are_those_of_the_code():
    text = (REPOSITORY / "docs" / "errors.md").read_text()
    for status in (0, 1, 2, PREEMPTED, INTERRUPTED):
        assert f"\n| {status} | " in text
