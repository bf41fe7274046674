"""Writes the pages that are made from the code: ``python docs/reference.py``.

What stands below :data:`NOTICE` in docs/configuration.md comes from the dataclasses of ``dora_dist/config``, in
docs/errors.md from the error classes of the package. What stands above it is written by hand.
"""

import ast
import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

from dora_dist.config.data import SourceConfig
from dora_dist.config.presets import DEFAULT, PRESETS
from dora_dist.config.presets import default_of as default_with
from dora_dist.config.run import RunConfig
from dora_dist.config.training import DEFAULT_TRAINING_ARGUMENTS, LORA_PLUS_RATIO, OWNED_TRAINING_ARGUMENTS
from dora_dist.console.errors import PREEMPTED

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "dora_dist"
NOTICE = "<!-- Made by `python docs/reference.py` from docstrings: change those, and run it. -->"
KINDS = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`"}


def in_cell(text: str) -> str:
    """A text in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def kind_of(hint: Any) -> str:
    """A type in words."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(kind_of, members)))
    if origin is list:
        return "list"
    if origin is dict:
        return "mapping"
    return KINDS[hint]


def default_of(field: "dataclasses.Field[Any]", defaults: object) -> str:
    """The default of a key; ``defaults`` is an instance of its section, or the class where some keys are required."""
    value = getattr(defaults, field.name, field.default)
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    if isinstance(value, list | dict):
        return "empty"
    return f"`{default_text(value)}`"


def default_text(value: object) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def meanings(section: type) -> dict[str, str]:
    """Key -> what its docstring says."""
    return {entry.arg_name: entry.description or "" for entry in parse(section.__doc__ or "").params}


def table(section: type, defaults: object, prefix: str) -> Iterator[str]:
    """The keys of one section as a table. Defaults are those of a configuration file, with the default preset."""
    hints, said = get_type_hints(section), meanings(section)
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for field in dataclasses.fields(section):
        if not dataclasses.is_dataclass(hints[field.name]):
            name, kind = f"`{prefix}{field.name}`", kind_of(hints[field.name])
            of_preset = PRESETS[DEFAULT].get(f"{prefix}{field.name}")
            default = default_of(field, defaults) if of_preset is None else f"`{default_text(of_preset)}`"
            yield f"| {name} | {kind} | {default} | {in_cell(said[field.name])} |"


def summary(section: type) -> str:
    """First lines of a docstring."""
    return parse(section.__doc__ or "").short_description or ""


def configuration() -> list[str]:
    """Tables of all keys."""
    lines = [
        "## Top level",
        "",
        *table(RunConfig, types.SimpleNamespace(preset=DEFAULT), ""),  # of a file; the class itself means the paper's
        "",
        *presets(),
    ]
    hints = get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        section = hints[field.name]
        if not dataclasses.is_dataclass(section):
            continue
        made = field.default_factory
        defaults = section if made is dataclasses.MISSING else made()
        lines += ["", f"## {field.name}", "", summary(section), "", *table(section, defaults, f"{field.name}.")]
        if field.name == "data":
            lines += ["", "### A source", "", summary(SourceConfig), "", *table(SourceConfig, SourceConfig, "")]
    return [*lines, "", *training()]


def presets() -> list[str]:
    """Keys of which the presets have other defaults."""
    rows = []
    for key in dict.fromkeys(key for keys in PRESETS.values() for key in keys):
        values = [default_with(key, preset) for preset in PRESETS]
        rows.append(f"| `{key}` | {' | '.join(f'`{default_text(value)}`' for value in values)} |")
    names = [f"`{name}`{' (default)' * (name == DEFAULT)}" for name in PRESETS]
    return [
        "## Presets",
        "",
        "`preset` sets defaults of the sections `adapter` and `pruning`; a key that you set wins. The presets differ",
        f"in these keys. The tables below have the defaults of `{DEFAULT}`.",
        "",
        f"| key | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *rows,
    ]


def training() -> list[str]:
    """The section without a class of its own."""
    defaults = [f"| `training.{name}` | `{value}` |" for name, value in DEFAULT_TRAINING_ARGUMENTS.items()]
    refused = [f"| `training.{name}` | {in_cell(why)} |" for name, why in sorted(OWNED_TRAINING_ARGUMENTS.items())]
    return [
        "## training",
        "",
        "Every field of `transformers.TrainingArguments` with the meaning that transformers gives it, and",
        f"`training.{LORA_PLUS_RATIO}`: the learning rate of the columns b_i over that of everything else (LoRA+).",
        "These defaults differ from those of transformers:",
        "",
        "| key | default |",
        "|---|---|",
        *defaults,
        "",
        "These fields are refused, because the program sets them itself:",
        "",
        "| key | reason, or what to set instead |",
        "|---|---|",
        *refused,
    ]


def error_classes() -> dict[str, tuple[str, str, str]]:
    """Name of each error class of the package -> its base class, its module, and the first lines of its docstring."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_"):
                (base,) = [ast.unparse(base) for base in node.bases]
                said = parse(ast.get_docstring(node) or "").short_description or ""
                found[node.name] = (base, str(path.relative_to(PACKAGE.parent)), said)
    return found


def status_of(name: str, bases: dict[str, str]) -> str:
    """Exit status of a command that ends with this error."""
    if name == "PreemptedError":
        return str(PREEMPTED)
    if name == "RanksLostError":
        return f"{PREEMPTED} or 1"
    while name in bases:
        name = bases[name]
    return "2" if name == "ValueError" else "1"


def errors() -> list[str]:
    """Table of the error classes."""
    found = error_classes()
    bases = {name: base for name, (base, _, _) in found.items()}
    rows = [
        f"| `{name}` | {status_of(name, bases)} | {in_cell(said)} | `{module}` |"
        for name, (_, module, said) in sorted(found.items())
    ]
    return ["| class | exit status | when | where |", "|---|---|---|---|", *rows]


PAGES = {"configuration.md": configuration, "errors.md": errors}
"""File in docs/ -> the function that makes the lines below :data:`NOTICE`."""


def page(name: str) -> str:
    """A page as it is now, with what is made from the code made anew."""
    by_hand, _, _ = (DOCS / name).read_text(encoding="utf-8").partition(NOTICE)
    return "\n".join([by_hand + NOTICE, "", *PAGES[name](), ""])


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(page(name), encoding="utf-8")
