"""How long a function may be, and how many arguments a constructor may take, read from the source."""

import ast
from pathlib import Path

import pytest
from support.repository import REPOSITORY

PACKAGE = REPOSITORY / "dora_dist"
LONGEST_FUNCTION = 60
"""Lines from ``def`` to the end: what fits on a screen is read at once, and what does not does several things."""
MOST_ARGUMENTS = 8
"""Arguments beside ``self``: an object that needs more is given parts that belong together as one object."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines of a function, decorators left out."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def count_arguments(function: Function) -> int:
    """Arguments of a method, ``self`` left out; ``*args`` and ``**kwargs`` count as one each."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) - 1 + (given.vararg is not None) + (given.kwarg is not None)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_are_short_and_constructors_take_few_arguments(path):
    found = functions(path)
    assert not {each.name: length(each) for each in found if length(each) > LONGEST_FUNCTION}
    constructors = [count_arguments(each) for each in found if each.name == "__init__"]
    assert max(constructors, default=0) <= MOST_ARGUMENTS


def test_the_counts_by_hand(tmp_path):
    source = tmp_path / "source.py"
    method = "    @decorator\n    def __init__(self, a, /, b, *c, d=1, **e):\n        x = 1\n"
    source.write_text(f"class A:\n{method}\n    async def f(self): ...\n")
    init, other = functions(source)
    assert (length(init), count_arguments(init)) == (2, 5)
    assert (length(other), count_arguments(other)) == (1, 0)
