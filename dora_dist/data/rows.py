"""Reading instruction rows and turning each into a prompt and the answer that is wanted."""

import glob
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the answer that is wanted, as text.

    Attributes:
        prompt: everything the model is given.
        completion: what it should answer; the loss is on this only.
    """

    prompt: str
    completion: str


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt of an instruction, in the plain form that Alpaca made common."""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _alpaca(row: Mapping[str, Any]) -> Example:
    return Example(alpaca_prompt(row["instruction"], row.get("input") or ""), row["output"])


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    return Example(row["prompt"], row["completion"])


@dataclass(frozen=True)
class RowFormat:
    """A way to write rows: the fields that must be there, those that may, and how an example is made of them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], Example]


FORMATS = {
    "alpaca": RowFormat(("instruction", "output"), ("input",), _alpaca),
    "prompt_completion": RowFormat(("prompt", "completion"), (), _prompt_completion),
}


def read_examples(paths: str | Sequence[str], row_format: str = "auto") -> list[Example]:
    """Read instruction files; every row is checked.

    Args:
        paths: JSON or JSONL file (gz too), or several, or globs of them.
        row_format: one of :data:`FORMATS`, or ``auto`` to tell by the fields of each file's first row.

    Raises:
        ValueError: no such file, not JSON, or a row that lacks a field, has a wrong type or an empty answer; the
            message names file, row and field.
    """
    files = _expand([paths] if isinstance(paths, str) else paths)
    return [example for file in files for example in _read_file(file, row_format)]


def _expand(patterns: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        matches = sorted(Path(match) for match in glob.glob(str(Path(pattern).expanduser())))
        if not matches:
            raise ValueError(f"no data file matches {pattern!r} (looked from {Path.cwd()})")
        files += matches
    return files


def _read_file(file: Path, row_format: str) -> Iterator[Example]:
    rows = _load_rows(file)
    if not rows:
        raise ValueError(f"{file} has no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number}: a row must be an object with named fields, got {row!r}")
    name = _tell_format(file, list(rows[0])) if row_format == "auto" else row_format
    layout = FORMATS[name]
    for number, row in enumerate(rows, start=1):
        _check_row(f"{file}, row {number}", row, layout, name)
        yield layout.build(row)


def _load_rows(file: Path) -> list[Any]:
    """Values of a JSON list, or of the lines of a JSONL file; told apart by their start, not by the file's name.

    Read as it is written: readers that infer a type for a whole column turn texts that look like dates into dates.
    """
    open_text = gzip.open if file.suffix == ".gz" else open
    try:
        with open_text(file, "rt", encoding="utf-8-sig") as stream:
            text = stream.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text: {error}") from None
    if text.lstrip().startswith("["):
        return _parse(text, str(file))
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"{file}, line {number}") for number, line in lines if line.strip()]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} cannot be read as JSON: {error}") from None


def _tell_format(file: Path, fields: Sequence[str]) -> str:
    for name, layout in FORMATS.items():
        if set(layout.required) <= set(fields):
            return name
    wanted = "; ".join(f"{name} needs {', '.join(layout.required)}" for name, layout in FORMATS.items())
    raise ValueError(f"{file}: the fields {', '.join(fields)} fit no known format ({wanted})")


def _check_row(place: str, row: Mapping[str, Any], layout: RowFormat, name: str) -> None:
    for field in layout.required:
        if not isinstance(row.get(field), str):
            raise ValueError(f"{place}: field {field!r} of format {name} must be text, got {row.get(field)!r}")
    for field in layout.optional:
        if not isinstance(row.get(field, ""), str | None):
            raise ValueError(f"{place}: field {field!r} of format {name} must be text or missing, got {row[field]!r}")
    if not layout.build(row).completion.strip():
        raise ValueError(f"{place}: field {layout.required[-1]!r} is empty, so that there is nothing to learn from it")
