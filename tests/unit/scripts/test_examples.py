"""The examples, where a package that they need is missing; ``tests/e2e/test_sft_trainer.py`` runs them."""

import runpy
import sys

import pytest
from support.repository import REPOSITORY


def test_without_trl_the_example_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r'^error: this example needs TRL \(.*\): pip install "dora-dist\[trl\]"$'):
        runpy.run_path(str(REPOSITORY / "examples" / "sft_trainer.py"))
