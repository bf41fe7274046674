"""Reading rows from wherever they are, one at a time, each with the place it stands in.

``datasets`` reads the Hub and the folders that it has saved. Files are read below it, by ``json``, ``csv`` and
``pyarrow``: through ``datasets``, JSON texts such as ``2024-01-01`` become dates, lines of a table with a field too
many shift their columns, and Parquet fills the memory with what nobody has asked for yet (docs/log.md).
"""

import csv
import glob
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dora_dist.data.reading.row_json import object_of
from dora_dist.data.reading.squad_file import is_squad_file, squad_rows

DEFAULT_SPLIT = "train"
SPLITS_FILE = "dataset_dict.json"
"""File that a saved folder with several splits has."""
HUB = "a data set on the Hub"
SPLITS = "a folder that was saved with several splits"
TABLE = "a table (.csv, .tsv)"
TEXT = "a text file (.txt)"
READ_BY = {
    "columns": (TABLE,),
    "quotes": (TABLE,),
    "text": (TEXT,),
    "subset": (HUB,),
    "split": (HUB, SPLITS),
    "revision": (HUB,),
}
"""Attributes of a location -> where they are read; all others are read everywhere."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was found.

    Attributes:
        place: file and line or row, for messages.
        json: the row as JSON; empty where there is a flaw.
        flaw: why it could not even be read, or empty.
        filled: whether a null in an object may stand for a key that the row never had: Arrow gives the objects of a
            column the same keys in all rows.
    """

    place: str
    json: str
    flaw: str = ""
    filled: bool = False


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where rows come from: local files, a folder that ``datasets`` saved, or a data set on the Hub.

    Attributes:
        files: local files or one saved folder, in order; empty for the Hub.
        hub: name on the Hub, or empty.
        subset: configuration of a data set on the Hub.
        split: split of a data set on the Hub, or of a saved folder with several; None for :data:`DEFAULT_SPLIT`.
        revision: commit or tag on the Hub.
        limit: most rows to read; None for all.
        columns: names of the columns of tables whose first line does not give them; empty where it does.
        quotes: whether a quotation mark at the start of a table's field encloses the field.
        text: rows of a text file: ``lines`` or ``whole``; None where there are no such files.
    """

    files: tuple[Path, ...] = ()
    hub: str = ""
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    limit: int | None = None
    columns: tuple[str, ...] = ()
    quotes: bool = True
    text: str | None = None

    def rows(self) -> Iterator[RawRow]:
        """The rows in order, read as they are asked for.

        Raises:
            ValueError: as :meth:`rows_of_all_sides`.
        """
        return self.rows_of_all_sides()

    def rows_of_all_sides(self) -> Iterator[RawRow]:
        """The rows in order, those that another side of a split has among them.

        Raises:
            ValueError: a file cannot be read as what its name or its first character says it is.
        """
        parts = (
            (read_file(file, self.split, self.columns, self.quotes, self.text) for file in self.files)
            if self.files
            else (self._hub_rows(),)
        )
        return itertools.islice(itertools.chain.from_iterable(parts), self.limit)

    def digest(self) -> str:
        """SHA-256 of the content: of all bytes of local files, of the commit on the Hub."""
        digest = sha256(
            repr((self.hub, self.subset, self.split, self.limit, self.columns, self.quotes, self.text)).encode()
        )
        for file in self.files:
            for part in sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]:
                about = part.stat()
                digest.update(repr(("".join(part.suffixes[-2:]).lower(), about.st_size)).encode())
                digest.update(digest_of(part.absolute(), about.st_size, about.st_mtime_ns))
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
            split = self.split or DEFAULT_SPLIT
            rows = load_dataset(self.hub, self.subset, split=split, revision=self.revision, streaming=True)
            yield from _dumped(rows, f"{self.hub} ({split})")


@cache
def digest_of(file: Path, size: int, changed: int) -> bytes:
    """SHA-256 of a file's bytes, which are read once in a process: both sides of a split ask for it, and every command
    that opens its data more than once.

    Args:
        file: absolute path of the file.
        size: its size in bytes.
        changed: time of its last change in nanoseconds; with another size or time it is read again.
    """
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").digest()


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # errors of several libraries, and of the network below them
        raise ValueError(
            f"{name!r} is no file here (looked from {Path.cwd()}) and cannot be read as a data set from the Hub: "
            f"{error}"
        ) from None


def locate(paths: str | Sequence[str], **settings: Any) -> Location:
    """Find what a source names.

    Args:
        paths: file, glob of files, folder of ``Dataset.save_to_disk``, or name on the Hub; or several files or globs.
        settings: other attributes of :class:`Location`.

    Raises:
        ValueError: nothing is there, or nothing that is there reads a setting.
    """
    patterns = [paths] if isinstance(paths, str) else list(paths)
    files: list[Path] = []
    for pattern in patterns:
        named = Path(pattern).expanduser()
        matches = [named] if named.exists() else sorted(map(Path, glob.glob(str(named), recursive=True)))
        if not matches and len(patterns) == 1 and _may_be_on_the_hub(pattern):
            return _checked(Location(hub=pattern, **settings), {HUB})
        if not matches:
            looked = f"looked from {Path.cwd()}"
            raise ValueError(f"no data file matches {pattern!r} ({looked}): correct data.train or data.eval")
        files += matches
    if twice := [file for number, file in enumerate(files) if file in files[:number]]:
        raise ValueError(f"{twice[0]} is named twice by {patterns}: its rows would count twice")
    for file in files:
        if file.is_dir() and not any((file / name).is_file() for name in ("state.json", SPLITS_FILE)):
            raise ValueError(
                f"{file} is a folder, but not one that Dataset.save_to_disk wrote: name its files, with a glob such as "
                f"{file}/*.jsonl"
            )
    return _checked(Location(files=tuple(files), **settings), set(map(_kind, files)))


def _checked(location: Location, kinds: set[str]) -> Location:
    """The location, where everything that is set has an effect.

    Raises:
        ValueError: it has an attribute that none of these kinds reads.
    """
    for name, read_by in READ_BY.items():
        value, default = getattr(location, name), getattr(Location, name)
        if value != default and not kinds.intersection(read_by):
            shown = list(value) if isinstance(value, tuple) else str(value).lower() if value is False else value
            others = f" (or of the {len(location.files) - 1} others)" * (len(location.files) > 1)
            where = location.hub or f"{location.files[0]}{others}"
            raise ValueError(
                f"{name} of a source is {shown}, which has no effect: it is read for {' and '.join(read_by)}, and "
                f"{where} is none. Omit {name}, or correct the path"
            )
    return location


def _kind(file: Path) -> str:
    """The kind of a file or saved folder in :data:`READ_BY`; empty for others."""
    if file.is_dir():
        return SPLITS if (file / SPLITS_FILE).is_file() else ""
    return {"csv": TABLE, "tsv": TABLE, "txt": TEXT}.get(_suffix(file), "")


def _suffix(file: Path) -> str:
    return file.name.removesuffix(".gz").rpartition(".")[2].lower()


def _may_be_on_the_hub(pattern: str) -> bool:
    local = pattern.startswith((".", "/", "~")) or glob.has_magic(pattern) or pattern.count("/") > 1
    return not local and Path(pattern).suffix not in {".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv", ".arrow"}


def read_file(
    file: Path, split: str | None = None, columns: Sequence[str] = (), quotes: bool = True, text: str | None = None
) -> Iterator[RawRow]:
    """The rows of one file or saved folder.

    Args:
        file: one that :func:`locate` has found.
        split: split of a saved folder with several; None for :data:`DEFAULT_SPLIT`.
        columns: names of the columns of a table without a header line.
        quotes: whether a quotation mark at the start of a table's field encloses the field.
        text: rows of a text file, ``lines`` (those that are not empty) or ``whole``, each with the field ``text``.

    Raises:
        ValueError: it cannot be read.
    """
    kind = _suffix(file)
    if file.is_dir():
        yield from _dumped(_saved(file, split or DEFAULT_SPLIT), str(file))
    elif kind == "parquet":
        yield from _dumped(_parquet(file), str(file))
    elif kind == "arrow":
        yield from _dumped(_arrow(file), str(file))
    elif kind in ("csv", "tsv"):
        yield from _table(file, "\t" if kind == "tsv" else ",", columns, quotes)
    elif kind == "txt":
        yield from _texts(file, text)
    else:
        yield from _json_rows(file)


def _texts(file: Path, text: str | None) -> Iterator[RawRow]:
    if text is None:
        raise ValueError(
            f"{file} is a text file: give its source text: lines (a document a line) or text: whole, or give rows as "
            ".jsonl, .json, .csv, .tsv, .parquet or .arrow"
        )
    with _reading(file), fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig") as stream:
        if text == "whole":
            yield RawRow(str(file), json.dumps({"text": stream.read()}, ensure_ascii=False))
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                content = json.dumps({"text": line.rstrip("\r\n")}, ensure_ascii=False)
                yield RawRow(f"{file}, line {number}", content)


def _saved(folder: Path, split: str) -> Iterable[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    with _reading(folder):
        saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(
            f"{folder} has no split {split!r}, but {', '.join(map(str, saved))}: set the split of the source"
        )
    return saved[split]


def _table(file: Path, separator: str, columns: Sequence[str], quotes: bool) -> Iterator[RawRow]:
    """Rows of a table as it is written. pandas would make numbers and dates of texts, and a missing value of ``NA``,
    shift lines with too many fields and fill up those with too few."""
    csv.field_size_limit(1 << 31)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE

    def opened() -> Any:
        return fsspec.open(str(file), "rt", compression="infer", encoding="utf-8-sig", newline="")

    def read(stream: Any) -> Iterator[list[str]]:
        try:
            yield from csv.reader(stream, delimiter=separator, strict=True, quoting=quoting)
        except csv.Error as error:
            hint = (
                "; where quotation marks are characters like others (GLUE's tables), set quotes: false for the source"
            )
            raise csv.Error(f"{error}{hint if quotes else ''}") from None

    with _reading(file), opened() as stream:
        first = next(read(stream), [])
    names = list(columns) or first
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{file}: the first line must name every column, each once, got {names}")
    if len(names) != len(first):
        raise ValueError(f"{file} has {len(first)} columns in its first line, but columns names {len(names)}: {names}")
    with _reading(file), opened() as stream:
        lines = itertools.islice(read(stream), 0 if columns else 1, None)
        filled = (line for line in lines if line)
        for number, line in enumerate(filled, start=1):
            place = f"{file}, row {number}"
            if len(line) != len(names):
                yield RawRow(place, "", f"has {len(line)} fields, but the table has {len(names)} columns")
            else:
                yield RawRow(place, json.dumps(dict(zip(names, line, strict=True)), ensure_ascii=False))


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Rows, one row group at a time; the scanner that ``datasets`` uses reads ahead until all is in memory."""
    with _reading(file), pq.ParquetFile(file, pre_buffer=False) as content:
        _check_columns(content.schema_arrow.names)
        for batch in content.iter_batches(200):
            yield from batch.to_pylist()


def _arrow(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file of either kind (stream or file), mapped into memory."""
    with _reading(file), pa.memory_map(str(file)) as source:
        try:
            batches = iter(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            content = pa.ipc.open_file(source)
            batches = map(content.get_batch, range(content.num_record_batches))
        for batch in batches:
            _check_columns(batch.schema.names)
            yield from batch.to_pylist()


def _check_columns(names: Sequence[str]) -> None:
    """Refuse columns of one name: a row as a dictionary would have the last of them only."""
    object_of([(name, None) for name in names])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{file} cannot be read: {type(cause).__name__}: {cause}") from None


def _dumped(rows: Iterable[dict[str, Any]], where: str) -> Iterator[RawRow]:
    """Rows that come from Arrow, as JSON."""
    for number, row in enumerate(rows, start=1):
        yield RawRow(f"{where}, row {number}", json.dumps(row, ensure_ascii=False, default=_name_type), filled=True)


def _name_type(value: object) -> dict[str, str]:
    """What stands for a value that JSON cannot write: an object, which no format takes for text."""
    return {"type": type(value).__name__}


def _json_rows(file: Path) -> Iterator[RawRow]:
    """Elements of a JSON list, questions of one of SQuAD's own files, or lines of a JSONL file; told apart by their
    start, not by the file's name."""
    with _reading(file):
        stream = fsspec.open(str(file), "rb", compression="infer").open()
    with stream, _reading(file):
        beginning = stream.read(4096)
        start = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        while not start and (more := stream.read(4096)):
            start = more.lstrip()[:1]
        stream.seek(0)
        if start == b"[":
            yield from _list_elements(stream.read(), file)
        elif is_squad_file(beginning):
            for place, row in squad_rows(stream.read()):
                yield RawRow(f"{file}, {place}", json.dumps(row, ensure_ascii=False))
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
    position = _skip(text, text.index("[") + 1, blank)
    more = text[position : position + 1] != "]"
    for number in itertools.count(1):
        if not more:
            break
        _, end = decoder.raw_decode(text, position)
        yield RawRow(f"{file}, row {number}", text[position:end])
        position = _skip(text, end, blank)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1, blank)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("neither a comma nor the end of the list", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("more text after the list", text, position + 1)


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
