"""An encoded source on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from dora_dist.console.text import aligned

LEFT_OUT = "left_out.jsonl"
MOST_LISTED = 20
"""Most names that a remark lists."""


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """Counts of the rows of a source; whatever is skipped is counted here.

    Attributes:
        rows: rows that were read.
        bad: rows that could not be used (``bad_rows: skip``).
        overlong: examples that were dropped because they were longer than ``max_length``.
        truncated: examples that were cut to fit.
        removed_tokens: tokens that were cut off.
        split: rows that became several examples: the chat template rewrites earlier turns, or a context is longer
            than a window.
        trimmed: conversations whose messages after the last answer that is trained were left out.
        unread: field of messages that is not read -> conversations that have it.
        unread_of_rows: field that is not read -> rows that have something in it, the most frequent one first.
        controls_as_text: control token -> rows that have it in a text, as plain text.
        controls_in_text: control token -> rows that have it in a text that is taken as it is, as the control token.
        examples: examples that are left.
        tokens: tokens of these examples.
        trained_tokens: those with a loss; all where the loss is not on tokens.
    """

    rows: int
    bad: int
    overlong: int
    truncated: int
    removed_tokens: int
    split: int
    trimmed: int
    unread: dict[str, int]
    unread_of_rows: dict[str, int]
    controls_as_text: dict[str, int]
    controls_in_text: dict[str, int]
    examples: int
    tokens: int
    trained_tokens: int

    def remarks(self) -> list[str]:
        """What a user should know, in words."""
        said = {
            f"skipped {self.bad} of {self.rows} rows that cannot be used": self.bad,
            f"dropped {self.overlong} examples that do not fit into data.max_length": self.overlong,
            f"truncated {self.truncated} examples by {self.removed_tokens} tokens in all": self.truncated,
            f"made several examples of each of {self.split} rows (of every answer of a conversation, where the chat "
            "template rewrites earlier turns; of every window of a long context)": self.split,
            f"removed the messages after the last trained answer in {self.trimmed} conversations": self.trimmed,
            f"fields of messages that are not read (conversations that have them): {_listed(self.unread)}": len(
                self.unread
            ),
            f"fields of rows that are not read (rows that have them): {_listed(self.unread_of_rows)}": len(
                self.unread_of_rows
            ),
            "control tokens that are plain text (rows that have them; a server would take them for control tokens): "
            + _listed(self.controls_as_text): len(self.controls_as_text),
            "control tokens in documents and plain prompts, which stay control tokens (rows that have them): "
            + f"{_listed(self.controls_in_text)}; data.control_tokens: text makes them text": len(
                self.controls_in_text
            ),
        }
        return [text for text, count in said.items() if count]


def _listed(counts: Mapping[str, int]) -> str:
    """Names with their counts; of many, the first ones and how many more there are."""
    named = [f"{name} ({count})" for name, count in counts.items()]
    return ", ".join([*named[:MOST_LISTED], *[f"{len(named) - MOST_LISTED} more"] * (len(named) > MOST_LISTED)])


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """One source, ready to be read.

    Attributes:
        name: name of the source.
        folder: its folder in the cache.
        format: the format that its rows were read in.
        dataset: the examples, memory-mapped: the columns of the format's encoder, ``removed``, ``key``, ``place``.
        counts: what became of the rows.
        digest: SHA-256 over all examples in their order.
    """

    name: str
    folder: Path
    format: str
    dataset: Dataset
    counts: SourceCounts
    digest: str

    def remarks(self) -> list[str]:
        """:meth:`SourceCounts.remarks` with the source's name, and where the skipped rows are listed."""
        remarks = [f"{self.name}: {remark}" for remark in self.counts.remarks()]
        if self.counts.bad or self.counts.overlong:
            remarks.append(f"{self.name}: skipped rows are listed in {self.folder / LEFT_OUT}")
        return remarks

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the dataset; nothing of it is read before it is used."""
        return arrow_column(self.dataset, name)

    def lengths(self, column: str = "input_ids") -> np.ndarray:
        """Number of entries of every example in a column of lists (by default its tokens), int64, shape (examples,)."""
        return list_lengths(self.column(column))

    def largest(self, column: str) -> int:
        """The largest number in a column of lists; -1 where all lists are empty."""
        found = (chunk.flatten().to_numpy() for chunk in self.column(column).chunks)
        return max((int(numbers.max()) for numbers in found if len(numbers)), default=-1)

    def unprompted(self) -> np.ndarray:
        """Indices of the examples whose last answer has nothing before it, int64, shape (found,)."""
        return np.flatnonzero(self.column("answer_start").to_numpy() == 0)

    def keys(self) -> np.ndarray:
        """Hash of every example, int64, shape (examples,)."""
        keys: np.ndarray = self.column("key").to_numpy()
        return keys


def arrow_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One column of the rows of a dataset, which may be a selection of those of its table."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(name)


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Lengths of the lists in a column, without reading what is in them, int64, shape (rows,)."""
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate(lengths or [[]]).astype(np.int64)


def render(title: str, sources: Sequence[PreparedSource]) -> str:
    """A table of sources: rows read, examples made of them, and the share of tokens that is trained."""
    header = (title, "format", "rows", "examples", "skipped", "truncated", "tokens", "trained", "longest")
    lines = [header]
    for source in sources:
        counts = source.counts
        lines.append(
            (
                source.name,
                source.format,
                f"{counts.rows:,}",
                f"{counts.examples:,}",
                f"{counts.bad + counts.overlong:,}",
                f"{counts.truncated:,}",
                f"{counts.tokens:,}",
                f"{counts.trained_tokens / counts.tokens:.1%}",
                f"{int(source.lengths().max()):,}",
            )
        )
    return aligned(lines)
