"""How entries of docstrings begin: ``path: the file to read.`` and not ``path: of the file.``, read from the source."""

import ast
from pathlib import Path

import pytest
from docstring_parser import DocstringStyle, parse
from support.repository import REPOSITORY

PACKAGE = REPOSITORY / "dora_dist"
PREPOSITIONS = {"of", "that", "whose", "with", "by", "over", "in", "for", "from", "on", "at"}
"""First words that do not say what a value is, but only continue its name."""
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def incomplete(path: Path) -> list[str]:
    """Entries of Args and Attributes in a file that begin with one of :data:`PREPOSITIONS`, as ``name: text``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.get_docstring(node) if isinstance(node, Documented) else None
        for entry in parse(text, DocstringStyle.GOOGLE).params if text else []:
            words = (entry.description or "").split()
            if words and words[0].strip(",:;").lower() in PREPOSITIONS:
                found.append(f"{entry.arg_name}: {entry.description}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_entries_say_what_a_value_is(path):
    assert incomplete(path) == []


def test_an_incomplete_entry_is_found(tmp_path):
    source = tmp_path / "source.py"
    bodies = [
        ["A function.", "", "Args:", "    path: of the file.", "    rank: offset of the rank."],
        ["A class.", "", "Attributes:", "    ids (list): For the tokens.", "", "Returns:", "    In order."],
    ]
    texts = ["".join(f"    {line}\n" for line in body) for body in bodies]
    source.write_text(f'def f():\n    """{texts[0]}    """\n\n\nclass A:\n    """{texts[1]}    """\n')
    assert incomplete(source) == ["path: of the file.", "ids: For the tokens."]
