"""Reading instruction rows and turning each into a prompt and the answer that is wanted."""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_dataset


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
    if not len(rows):
        raise ValueError(f"{file} has no rows")
    name = _tell_format(file, rows.column_names) if row_format == "auto" else row_format
    layout = FORMATS[name]
    for number, row in enumerate(rows, start=1):
        _check_row(f"{file}, row {number}", row, layout, name)
        yield layout.build(row)


def _load_rows(file: Path) -> Dataset:
    disable_progress_bars()
    try:
        return load_dataset("json", data_files=str(file), split="train", cache_dir=None)
    except Exception as error:  # datasets raises many types, with pyarrow's message at the root
        cause = error.__cause__ or error
        raise ValueError(f"{file} cannot be read as JSON or JSONL: {cause}") from None
    finally:
        enable_progress_bars()


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
