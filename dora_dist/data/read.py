"""Reading rows from wherever they are, one at a time, each with the place it stands in.

``datasets`` reads Parquet, CSV, Arrow folders and the Hub. JSON is read line by line with ``json``: ``datasets`` gives
every JSON column one type, and so turns texts such as ``2024-01-01`` into dates without a word (docs/log.md).
"""

import csv
import glob
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec

HUB_ERRORS = (OSError, ValueError, RuntimeError)
"""What datasets raises for a name that is on no hub, or a hub that cannot be reached."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was found.

    Attributes:
        place: file and line or row, for messages.
        json: the row as JSON; empty where there is a flaw.
        flaw: why it could not even be read, or empty.
    """

    place: str
    json: str
    flaw: str = ""


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where rows come from: local files, a folder that ``datasets`` saved, or a data set on the Hub.

    Attributes:
        files: local files or one saved folder, in order; empty for the Hub.
        hub: name on the Hub, or empty.
        subset: configuration of a data set on the Hub.
        split: of a data set on the Hub or a saved folder with several.
        revision: commit or tag on the Hub.
        limit: rows to read at most, or None.
        columns: names of the columns of tables whose first line does not give them; empty where it does.
    """

    files: tuple[Path, ...] = ()
    hub: str = ""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: int | None = None
    columns: tuple[str, ...] = ()

    def rows(self) -> Iterator[RawRow]:
        """All rows in order, read as they are asked for.

        Raises:
            ValueError: a file cannot be read as what its name or its first character says it is.
        """
        parts = (
            (read_file(file, self.split, self.columns) for file in self.files) if self.files else (self._hub_rows(),)
        )
        return itertools.islice(itertools.chain.from_iterable(parts), self.limit)

    def digest(self) -> str:
        """SHA-256 of the content: of all bytes of local files, of the commit on the Hub."""
        digest = sha256(repr((self.hub, self.subset, self.split, self.limit, self.columns)).encode())
        for file in self.files:
            for part in sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]:
                with part.open("rb") as stream:
                    while chunk := stream.read(1 << 22):
                        digest.update(chunk)
        if self.hub:
            digest.update(self._commit().encode())
        return digest.hexdigest()

    def _commit(self) -> str:
        from huggingface_hub import HfApi

        with _from_hub(self.hub):
            return str(HfApi().dataset_info(self.hub, revision=self.revision).sha)

    def _hub_rows(self) -> Iterator[RawRow]:
        from datasets import load_dataset

        with _from_hub(self.hub):
            rows = load_dataset(self.hub, self.subset, split=self.split, revision=self.revision, streaming=True)
        yield from _dumped(rows, f"{self.hub} ({self.split})")


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    try:
        yield
    except HUB_ERRORS as error:
        raise ValueError(
            f"{name!r} is no file here (looked from {Path.cwd()}) and cannot be read as a data set from the Hub: "
            f"{error}"
        ) from None


def locate(paths: str | Sequence[str], **hub: Any) -> Location:
    """Find what a source names.

    Args:
        paths: file, glob of files, folder of ``Dataset.save_to_disk``, or name on the Hub; or several files or globs.
        hub: other attributes of :class:`Location`.

    Raises:
        ValueError: nothing is there.
    """
    patterns = [paths] if isinstance(paths, str) else list(paths)
    files: list[Path] = []
    for pattern in patterns:
        matches = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches and len(patterns) == 1 and _may_be_on_the_hub(pattern):
            return Location(hub=pattern, **hub)
        if not matches:
            raise ValueError(f"no data file matches {pattern!r} (looked from {Path.cwd()})")
        files += matches
    for file in files:
        if file.is_dir() and not any((file / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise ValueError(
                f"{file} is a folder, but not one that Dataset.save_to_disk wrote: name its files, with a glob such as "
                f"{file}/*.jsonl"
            )
    return Location(files=tuple(files), **hub)


def _may_be_on_the_hub(pattern: str) -> bool:
    local = pattern.startswith((".", "/", "~")) or glob.has_magic(pattern) or pattern.count("/") > 1
    return not local and Path(pattern).suffix not in {".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv", ".arrow"}


def read_file(file: Path, split: str = "train", columns: Sequence[str] = ()) -> Iterator[RawRow]:
    """The rows of one file or saved folder.

    Args:
        file: one that :func:`locate` has found.
        split: of a saved folder with several.
        columns: names of the columns of a table without a header line.

    Raises:
        ValueError: it cannot be read.
    """
    kind = file.name.removesuffix(".gz").rpartition(".")[2].lower()
    if file.is_dir():
        yield from _dumped(_saved(file, split), str(file))
    elif kind in ("parquet", "arrow"):
        yield from _dumped(_built(kind, file), str(file))
    elif kind in ("csv", "tsv"):
        yield from _dumped(_table(file, "\t" if kind == "tsv" else ",", columns), str(file))
    else:
        yield from _json_rows(file)


def _saved(folder: Path, split: str) -> Iterable[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    with _reading(folder):
        saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"{folder} has no split {split!r}, but {', '.join(saved)}: set the split of the source")
    return saved[split]


def _built(kind: str, file: Path, **options: Any) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    with _reading(file):
        yield from load_dataset(kind, data_files=str(file), split="train", streaming=True, **options)


def _table(file: Path, separator: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A table as it is written: left to itself, pandas makes numbers and dates of texts, and nothing of ``NA``."""
    from datasets import Features, Value

    with _reading(file), fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig", newline="") as stream:
        first = next(csv.reader(stream, delimiter=separator), [])
    names = list(columns) or first
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{file}: the first line must name every column, each once, got {names}")
    if len(names) != len(first):
        raise ValueError(f"{file} has {len(first)} columns in its first line, but columns names {len(names)}: {names}")
    texts = Features({name: Value("string") for name in names})
    yield from _built(
        "csv",
        file,
        sep=separator,
        names=names if columns else None,
        features=texts,
        keep_default_na=False,
        na_filter=False,
        encoding="utf-8-sig",
    )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{file} cannot be read: {type(cause).__name__}: {cause}") from None


def _dumped(rows: Iterable[dict[str, Any]], where: str) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(f"{where}, row {number}", json.dumps(row, ensure_ascii=False, default=_name_type))


def _name_type(value: object) -> dict[str, str]:
    """In place of a value that JSON cannot say: an object, which no format takes for text."""
    return {"type": type(value).__name__}


def _json_rows(file: Path) -> Iterator[RawRow]:
    """Elements of a JSON list, or lines of a JSONL file; told apart by their start, not by the file's name."""
    with _reading(file):
        stream = fsspec.open(str(file), "rb", compression="infer").open()
    with stream, _reading(file):
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        stream.seek(0)
        if start == b"[":
            yield from _list_elements(stream.read(), file)
        else:
            yield from _lines(stream, file)


def _lines(stream: io.IOBase, file: Path) -> Iterator[RawRow]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            yield RawRow(place, line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield RawRow(place, "", f"is not UTF-8: {error}")


def _list_elements(content: bytes, file: Path) -> Iterator[RawRow]:
    """Elements as they are written, one after the other: the whole text is held, but only one parsed row."""
    text = content.decode("utf-8-sig")
    decoder, blank = json.JSONDecoder(), " \t\r\n"
    position = text.index("[") + 1
    for number in itertools.count(1):
        position = _skip(text, position, blank)
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                raise json.JSONDecodeError("more text after the list", text, position + 1)
            return
        _, end = decoder.raw_decode(text, position)
        yield RawRow(f"{file}, row {number}", text[position:end])
        position = _skip(text, end, blank)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("neither a comma nor the end of the list", text, position)


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
