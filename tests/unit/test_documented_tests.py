"""The documents name tests as proofs: those that they name exist, and every guarantee has some."""

import re
from functools import cache
from pathlib import Path

import pytest
from support.repository import REPOSITORY

TESTS = REPOSITORY / "tests"
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
NAMED = re.compile(r"((?:[\w/]*/)?test_\w+\.py)?(?:::(test_\w+))?")
GUARANTEES = re.compile(r"\n## Guarantees.*?\n(?=## )", re.DOTALL)


@cache
def functions(path: Path) -> set[str]:
    """Tests of a file."""
    return set(re.findall(r"^ *def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE))


def found(file: str) -> list[Path]:
    """Files that a name stands for, which may leave out the folders that it lies in."""
    wanted = file.removeprefix("tests/")
    return [path for path in TESTS.rglob("test_*.py") if f"/{path.relative_to(TESTS)}".endswith(f"/{wanted}")]


def missing(text: str) -> list[str]:
    """Files and tests that a text names, and that are not there. ``::test_x`` is one of the file named before it."""
    flaws, file = [], ""
    for match in NAMED.finditer(text):
        named, test = match.groups()
        file = named or file
        if named and not found(named):
            flaws.append(named)
        elif test and not any(test in functions(path) for path in found(file)):
            flaws.append(f"{file}::{test}")
    return flaws


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_a_document_names_are_there(document):
    assert missing(document.read_text(encoding="utf-8")) == []


def test_every_guarantee_has_tests():
    (section,) = GUARANTEES.findall((REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8"))
    rows = dict(re.findall(r"^\| (\w.+?) \| (`.+`|) \|$", section, re.MULTILINE))
    assert len(rows) > 10
    for words, tests in rows.items():
        assert "::test_" in tests, words


def test_a_test_that_is_gone_would_be_noticed():
    text = "`unit/test_lanes.py::test_x`, `::test_tests_that_a_document_names_are_there`, `e2e/test_lanes.py`"
    assert missing(text) == [
        "unit/test_lanes.py::test_x",
        "unit/test_lanes.py::test_tests_that_a_document_names_are_there",
        "e2e/test_lanes.py",
    ]
    assert missing("`test_documented_tests.py::test_a_test_that_is_gone_would_be_noticed`, `...[a case]`") == []
