"""Encoded data on disk: made once, by one process, and read by all.

A folder of the cache holds one source under one set of rules. Its name contains a hash of all that its content
depends on: the data's bytes, the tokenizer, the rules, this package's own code and the libraries' versions.
"""

import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, load_from_disk
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from dora_dist.config.checks import nearest
from dora_dist.console.files import digest_sources
from dora_dist.console.text import first_lines, say
from dora_dist.data.encoding.encoder import (
    BOOKKEEPING,
    ControlTokensError,
    EncodingRules,
    RowEncoder,
    Status,
    UnusableRowError,
)
from dora_dist.data.prepared import LEFT_OUT, PreparedSource, SourceCounts, arrow_column, list_lengths
from dora_dist.data.reading.files import Location, RawRow
from dora_dist.data.reading.row_json import parse_json
from dora_dist.data.reading.samples import has_value_at
from dora_dist.data.row_formats import FORMATS, build_encoder

MANIFEST = "prepared.json"
ROWS_AT_A_TIME = 1000
LEAST_ROWS_PER_WORKER = 1000
LEAST_TRAINED_SHARE = 0.01
KEPT_BOOKKEEPING = ("removed", "key", "place")
MOST_NAMED = 5
"""Most rows, or tokens, that an error or a remark lists."""
MOST_FIELDS_NAMED = 20
"""Most fields that a remark lists."""
FIRST_ROWS = 20
"""Number of rows from which the format of a source is told."""


class NoExamplesError(ValueError):
    """A source has no rows, or none that can be used."""


def first_rows(location: Location) -> list[dict[str, Any]]:
    """Those of the :data:`FIRST_ROWS` first rows that can be read as objects, to tell the format by.

    Raises:
        ValueError: there are none.
    """
    rows, flaws = [], []
    for raw in itertools.islice(location.rows(), FIRST_ROWS):
        try:
            row = parse_json(raw.json) if not raw.flaw else None
        except (ValueError, RecursionError) as error:
            row, raw = None, RawRow(raw.place, "", f"cannot be read as JSON: {error}")
        if isinstance(row, dict):
            rows.append(row)
        else:
            flaws.append(f"{raw.place}: {raw.flaw or f'must be an object with named fields, got {raw.json[:80]}'}")
    if not rows:
        where = location.hub or ", ".join(map(str, location.files))
        raise ValueError(flaws[0] if flaws else f"{where} has no rows")
    return rows


def prepare_source(
    name: str, location: Location, rules: EncodingRules, tokenizer: PreTrainedTokenizerBase, cache: Path, workers: int
) -> PreparedSource:
    """The encoded source, from the cache, or made now.

    One process makes it; others that ask for it at the same time wait for the file lock, outside of any collective.

    Args:
        name: name of the source, for messages.
        location: where its rows are.
        rules: how rows become examples.
        tokenizer: the model's tokenizer.
        cache: folder of all prepared data.
        workers: largest number of processes that encode.

    Raises:
        NoExamplesError: there are no rows, or none that can be used.
        ValueError: the data cannot be used for another reason.
    """
    encoder = build_encoder(tokenizer, rules)
    key = _cache_key(location, rules, tokenizer)
    folder = cache / f"{_file_name(name)}-{key[:20]}"
    if not (folder / MANIFEST).is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir {cache} cannot be made: {error}; set it to a folder of yours") from None
        with _locked(folder, name):
            if not (folder / MANIFEST).is_file():
                for left in cache.glob(f".{folder.name}.partial-*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                _prepare(name, location, encoder, folder, key, workers)
    return _open(name, folder)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        say(f"{name}: another process is preparing it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "_" for character in name)[:60]


def _cache_key(location: Location, rules: EncodingRules, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = sha256(location.digest().encode())
    digest.update(json.dumps(asdict(rules), sort_keys=True).encode())
    digest.update(tokenizer_digest(tokenizer).encode())
    digest.update(digest_sources(Path(__file__).parent).encode())
    digest.update(repr([version(name) for name in ("transformers", "tokenizers", "datasets", "jinja2")]).encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that a tokenizer would save, without its chat template (the rules have the one that is used)."""
    digest = sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as scratch:
        for file in sorted(tokenizer.save_pretrained(scratch)):
            if not file.endswith(".jinja"):
                digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _prepare(
    name: str, location: Location, encoder: RowEncoder[Any, Any], folder: Path, key: str, workers: int
) -> None:
    _check_names(name, location, encoder.rules)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as scratch:
        work = Path(scratch)
        rows = _store_rows(location, work / "rows.arrow")
        if not len(rows):
            raise NoExamplesError(f"{name} has no rows")
        workers = max(1, min(workers, len(rows) // LEAST_ROWS_PER_WORKER))
        examples = _encode_rows(name, rows, encoder, work, key, workers)
        finished = work / "finished"
        status = examples.with_format("numpy")["status"][:]
        if encoder.rules.bad_rows == "error":
            _refuse_controls(name, rows, examples.select(np.flatnonzero(status == Status.BAD)))
        kept = examples if (status == Status.KEPT).all() else examples.select(np.flatnonzero(status == Status.KEPT))
        if not len(kept):
            first = examples[0]
            raise NoExamplesError(f"{name}: none of {len(rows)} rows can be used; the first: {_reason(first)}")
        kept.select_columns([*encoder.columns, *KEPT_BOOKKEEPING]).save_to_disk(str(finished))
        _list_left_out(examples, status, finished / LEFT_OUT)
        content = {
            "format": encoder.rules.format,
            "digest": sha256(examples.with_format("numpy")["key"][:][status == Status.KEPT].tobytes()).hexdigest(),
            "counts": asdict(_count(len(rows), examples, status, encoder.controls.as_text)),
            "rules": asdict(encoder.rules),
        }
        # The manifest comes last, and the folder appears under its name as a whole.
        (finished / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        finished.rename(folder)


def _check_names(name: str, location: Location, rules: EncodingRules) -> None:
    """A row may lack a field that its format needs not, or that is passed over. That all do is a wrong name.

    No more rows are read than it takes to find all.

    Raises:
        ValueError: there is one.
    """
    optional = {own: wanted for wanted, own in rules.fields.items() if wanted in FORMATS[rules.format].optional}
    missing = [*optional, *rules.ignore]
    known: set[str] = set()
    rows = location.rows_of_all_sides()
    while missing and (raw := next(rows, None)) is not None:
        try:
            row = parse_json(raw.json) if not raw.flaw else None
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            missing = [own for own in missing if not (has_value_at(row, own) if own in optional else own in row)]
            known.update(row)
    if not missing or not known:
        return
    own = missing[0]
    said, way_out = (
        (f"the fields of {name} say that {optional[own]} is {own!r}", f"leave {optional[own]} out of the fields")
        if own in optional
        else (f"the ignore of {name} names {own!r}", "leave it out of the ignore")
    )
    raise ValueError(
        f"{said}, which none of its rows has{nearest(own, sorted(known))} (they have "
        f"{', '.join(sorted(known)[:MOST_FIELDS_NAMED])}): correct the name, or {way_out}"
    )


def _refuse_controls(name: str, rows: Dataset, bad: Dataset) -> None:
    """Stop with all rows that hold control tokens; any other bad row has stopped the run already.

    Raises:
        ControlTokensError: there are some.
    """
    if not len(bad):
        return
    counts = Counter(token for tokens in bad["controls"] for token in tokens)
    tokens = ", ".join(f"{token!r} in {count}" for token, count in counts.most_common(MOST_NAMED))
    others = f" and {len(counts) - MOST_NAMED} more" * (len(counts) > MOST_NAMED)
    first = [_reason(row) for row in bad.take(min(MOST_NAMED, len(bad)))]
    shown = first_lines(first, MOST_NAMED, total=len(bad))
    raise ControlTokensError(
        f"{name}: control tokens stand in the texts of {len(bad)} of {len(rows)} rows ({tokens}{others}):{shown}"
    )


def _reason(row: Mapping[str, Any]) -> str:
    return f"{row['place']}: {row['note']}"


def _list_left_out(examples: Dataset, status: np.ndarray, path: Path) -> None:
    rows = examples.select_columns(["place", "status", "note"]).select(np.flatnonzero(status != Status.KEPT))
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            line = {"place": row["place"], "why": Status(row["status"]).name.lower(), "reason": row["note"]}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _store_rows(location: Location, path: Path) -> Dataset:
    """Rows as text in an Arrow file, so that workers can share them and memory does not limit their number."""
    schema = pa.schema({"place": pa.string(), "json": pa.large_string(), "flaw": pa.string(), "filled": pa.bool_()})
    rows = location.rows()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while chunk := list(itertools.islice(rows, ROWS_AT_A_TIME)):
            writer.write_table(pa.Table.from_pylist([asdict(row) for row in chunk], schema=schema))
    return Dataset.from_file(str(path))


def _encode_rows(
    name: str, rows: Dataset, encoder: RowEncoder[Any, Any], work: Path, key: str, workers: int
) -> Dataset:
    say(f"{name}: encoding {len(rows)} rows with {workers} worker{'s' * (workers > 1)}", from_any_rank=True)
    try:
        mapped: Dataset = rows.map(
            encoder,
            batched=True,
            batch_size=ROWS_AT_A_TIME,
            num_proc=workers if workers > 1 else None,
            remove_columns=rows.column_names,
            # datasets declares no self in Features.__init__, so that mypy takes the first argument for it.
            features=Features({**encoder.columns, **BOOKKEEPING}),  # type: ignore[arg-type]
            cache_file_name=str(work / "examples.arrow"),
            load_from_cache_file=False,
            new_fingerprint=key[:32],
            desc=f"encoding {name}",
        )
    except UnusableRowError as error:
        # What a worker raises comes with the worker's traceback, which says nothing about the row.
        raise ValueError(str(error)) from None
    return mapped


def _count(num_rows: int, examples: Dataset, status: np.ndarray, controls_are_text: bool) -> SourceCounts:
    columns = examples.select_columns(["removed", "trimmed"]).with_format("numpy")[:]
    places = Counter(examples["place"]) if len(examples) > num_rows else {}
    has_controls = (list_lengths(arrow_column(examples, "controls")) > 0) & (status == Status.KEPT)
    held = {row["place"]: row["controls"] for row in examples.select(np.flatnonzero(has_controls))}
    controls = dict(Counter(token for found in held.values() for token in found).most_common())
    tokens = int(list_lengths(arrow_column(examples, "input_ids")).sum())
    unread = (name for chunk in arrow_column(examples, "unread_of_row").chunks for name in chunk.flatten().to_pylist())
    return SourceCounts(
        rows=num_rows,
        bad=int((status == Status.BAD).sum()),
        overlong=int((status == Status.OVERLONG).sum()),
        truncated=int((columns["removed"] > 0).sum()),
        removed_tokens=int(columns["removed"].sum()),
        split=sum(count > 1 for count in places.values()),
        trimmed=int((columns["trimmed"] > 0).sum()),
        unread=dict(sorted(Counter(name for names in examples["unread"] for name in names.split(",") if name).items())),
        unread_of_rows=dict(Counter(unread).most_common()),
        controls_as_text=controls if controls_are_text else {},
        controls_in_text={} if controls_are_text else controls,
        examples=int((status == Status.KEPT).sum()),
        tokens=tokens,
        trained_tokens=_num_trained(examples) if "spans" in examples.column_names else tokens,
    )


def _num_trained(examples: Dataset) -> int:
    """Number of labels of all examples, from the spans' flat values; the first position of an example has none."""
    total = 0
    for chunk in arrow_column(examples, "spans").chunks:
        edges = chunk.flatten().to_numpy().astype(np.int64)
        total += int((edges[1::2] - edges[::2]).sum() - (edges[::2] == 0).sum())
    return total


def _open(name: str, folder: Path) -> PreparedSource:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    dataset = load_from_disk(str(folder))
    assert isinstance(dataset, Dataset)
    source = PreparedSource(
        name=name,
        folder=folder,
        format=content["format"],
        dataset=dataset,
        counts=SourceCounts(**content["counts"]),
        digest=content["digest"],
    )
    trained, tokens = source.counts.trained_tokens, source.counts.tokens
    if trained < LEAST_TRAINED_SHARE * tokens:
        raise ValueError(
            f"{name}: only {trained} of {tokens} tokens are answers to learn from, under {LEAST_TRAINED_SHARE:.0%}; "
            "check that the answers are in the right field"
        )
    return source
