"""Token ids of rows, and which of them are trained."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from typing import Any, ClassVar, Generic, TypeVar

from datasets import List, Value
from transformers import PreTrainedTokenizerBase

from dora_dist.console.text import first_lines
from dora_dist.data.encoding.control_tokens import control_tokens
from dora_dist.data.reading.row_json import parse_json
from dora_dist.data.reading.samples import RowFlaw

IGNORED = -100
"""Label of a position without loss, as in PyTorch's cross-entropy."""


IDS_ONLY = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
"""Arguments of a tokenizer that is asked for ids only: masks that nobody reads would take a third of the time, and
lengths are checked here."""
BOOKKEEPING: dict[str, Any] = {
    "removed": Value("int32"),
    "key": Value("int64"),
    "place": Value("string"),
    "status": Value("int8"),
    "note": Value("string"),
    "trimmed": Value("int32"),
    "unread": Value("string"),
    "unread_of_row": List(Value("string")),
    "controls": List(Value("string")),
}
"""Columns that examples of every kind have beside their own."""


MOST_SHOWN = 10
"""Most unusable rows of a batch that an error shows."""


class UnusableRowError(ValueError):
    """A row cannot be used, and data.bad_rows or data.overlong is error."""


class ControlTokensError(ValueError):
    """Texts of rows hold control tokens, data.control_tokens is refuse, and data.bad_rows is error."""


class ControlFlaw(RowFlaw):
    """A row with control tokens in its texts, which may be one of many.

    Args:
        field: name of the first field that has some.
        reason: why they may not be there, in words.
        tokens: all that the row has, each once.
    """

    def __init__(self, field: str, reason: str, tokens: list[str]) -> None:
        super().__init__(field, reason)
        self.tokens = tokens


class Status(IntEnum):
    """What became of a row."""

    KEPT = 0
    BAD = 1
    OVERLONG = 2


@dataclass(frozen=True, kw_only=True)
class EncodingRules:
    """All that decides, beside tokenizer and rows, what a row becomes.

    Attributes:
        format: a name of :data:`~dora_dist.data.row_formats.FORMATS`.
        fields: the format's name of a field -> the rows' own, where they differ.
        ignore: names of fields of rows that are passed over.
        as_chat: whether rows that are no conversations go into the chat template too.
        prompt: template of a row's prompt, with names of fields in braces; None for the row's own prompt.
        system: system message for conversations that have none; empty for none.
        template: Jinja source of the chat template, or None where no row needs one.
        train_on: ``assistant`` (all turns), ``last`` (turn) or ``everything``.
        thoughts: whether thoughts in what is trained have a loss.
        max_length: longest example in tokens.
        overlong: ``error``, ``drop`` or ``truncate``.
        bad_rows: ``error`` or ``skip``.
        control_tokens: ``refuse`` those in texts, or write them as ``text``.
        labels: ``classes`` or ``regression``.
        stride: tokens of a context that neighbouring windows share (questions).
        max_target_length: longest summary in tokens.
    """

    format: str
    fields: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    as_chat: bool = False
    prompt: str | None = None
    system: str = ""
    template: str | None = None
    train_on: str = "assistant"
    thoughts: bool = True
    max_length: int = 2048
    overlong: str = "error"
    bad_rows: str = "error"
    control_tokens: str = "refuse"
    labels: str = "classes"
    stride: int = 128
    max_target_length: int = 128


_HALF_PAIR = re.compile("[\ud800-\udfff]")


P = TypeVar("P")
E = TypeVar("E")
RowParser = Callable[[Mapping[str, Any], bool], tuple[Any, list[str]]]
"""Makes of a row, and of whether nulls in it may stand for keys that it never had, its sample and the names of its
fields that are not read; raises :class:`RowFlaw`."""


class RowEncoder(ABC, Generic[P, E]):
    """Turns rows into examples, many at a time; the same rows give the same examples in any process.

    A row is parsed to a sample, which becomes one part or several; the parts of many rows are encoded together, and
    each is made to fit.

    Args:
        tokenizer: the model's.
        rules: how rows become examples.
        parse: makes the sample of a row that is written in the format ``rules.format``.

    Attributes:
        columns: what an example consists of, with the types of its columns; ``input_ids`` is one of them.
        controls: what becomes of control tokens in texts.
        writer: the tokenizer that texts are encoded with.

    Raises:
        ValueError: control tokens are to be text, and the tokenizer cannot do that.
    """

    columns: ClassVar[dict[str, Any]]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules, parse: RowParser) -> None:
        self.tokenizer = tokenizer
        self.rules = rules
        self._parse_row = parse
        self.controls = control_tokens(tokenizer, rules.control_tokens)
        self.writer = self.controls.writer

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode a batch of rows for ``Dataset.map(batched=True)``.

        Args:
            batch: columns ``place``, ``json``, ``flaw``, ``filled`` of :class:`~dora_dist.data.reading.files.RawRow`.

        Returns:
            Columns with a line for each example, and for each row that became none: :attr:`columns`, and ``removed``
            (tokens that were cut off), ``key`` (a hash of the example), ``place``, ``status``, ``note``, ``trimmed``
            (messages left out after the last that is trained), ``unread`` (fields of messages that are not read, with
            commas), ``unread_of_row`` (those of the row, at its first example), ``controls`` (control tokens in the
            row's texts). A row with control tokens that are refused has the status of a bad one under both policies,
            so that all can be counted.

        Raises:
            UnusableRowError: a row cannot be used, under the policy ``error``.
        """
        columns: dict[str, list[Any]] = {name: [] for name in (*self.columns, *BOOKKEEPING)}
        found: list[tuple[str, list[str], list[str], P | RowFlaw]] = []
        flaws: list[str] = []
        for place, *raw in zip(*(batch[name] for name in ("place", "json", "flaw", "filled")), strict=True):
            try:
                sample, unread = self._parse(*raw)
                controls = self._controls_in(sample)
                found += [(place, controls, [] if n else unread, part) for n, part in enumerate(self._parts(sample))]
            except ControlFlaw as error:
                found.append((place, error.tokens, [], error))
            except RowFlaw as error:
                flaws.append(f"{place}: {error}")
                found.append((place, [], [], error))
        encoded = iter(self._encode([part for *_, part in found if not isinstance(part, RowFlaw)]))
        for place, controls, unread, part in found:
            example, status, note = None, Status.BAD, str(part)
            if not isinstance(part, RowFlaw):
                made = next(encoded)
                if isinstance(made, RowFlaw):
                    flaws.append(f"{place}: {made}")
                    note = str(made)
                else:
                    example, status, note = self._fit(part, made, place)
            content = self._content(example)
            line = {
                **content,
                **{"key": _key(self._hashed(content)), "place": place, "status": int(status), "note": note},
                "trimmed": 0 if isinstance(part, RowFlaw) else self._num_trimmed(part),
                "unread": "" if isinstance(part, RowFlaw) else ",".join(self._unread(part)),
                "unread_of_row": unread,
                "controls": controls,
            }
            for name, value in line.items():
                columns[name].append(value)
        if flaws and self.rules.bad_rows == "error":
            raise UnusableRowError(_unusable(flaws))
        return columns

    @abstractmethod
    def _texts(self, sample: Any) -> Iterable[tuple[str, str]]:
        """Field and text of all that is text in a sample."""

    def _rendered(self, sample: Any) -> Iterable[tuple[str, str]]:
        """Field and text of what may hold control tokens on purpose, unless they are to be text."""
        return ()

    @abstractmethod
    def _parts(self, sample: Any) -> list[P]:
        """What is encoded of a sample.

        Raises:
            RowFlaw: the sample cannot be used.
        """

    @abstractmethod
    def _encode(self, parts: Sequence[P]) -> Sequence[E | RowFlaw]:
        """Examples of parts, or what is wrong with one, without a look at their length."""

    @abstractmethod
    def _fit(self, part: P, example: E, place: str) -> tuple[E | None, Status, str]:
        """The example within ``max_length`` by the policy ``overlong``, or None; its status, and why it is left out."""

    @abstractmethod
    def _content(self, example: E | None) -> dict[str, Any]:
        """Values of :attr:`columns`, and ``removed``; empty ones for None."""

    @abstractmethod
    def _hashed(self, content: Mapping[str, Any]) -> bytes:
        """The bytes that tell the example from others, for its hash."""

    def _num_trimmed(self, part: P) -> int:
        return 0

    def _unread(self, part: P) -> Sequence[str]:
        return ()

    def _too_long(self, length: int, place: str, rule: str = "max_length") -> str:
        """Note on an example that is longer than a rule allows.

        Raises:
            UnusableRowError: under the policy ``error``.
        """
        note = f"{length} tokens, more than data.{rule} {getattr(self.rules, rule)}"
        if self.rules.overlong == "error":
            raise UnusableRowError(
                f"{place} has {note}: raise it, or set data.overlong to drop or truncate (what the tokens are: "
                "dora-dist preview)"
            )
        return note

    def _parse(self, text: str, flaw: str, filled: bool) -> tuple[Any, list[str]]:
        """The sample that a row describes, and the names of its fields that are not read.

        Raises:
            RowFlaw: the row describes none.
        """
        if flaw:
            raise RowFlaw("", flaw)
        try:
            row = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise RowFlaw("", f"cannot be read as JSON: {error}") from None
        if "\\u" in text and _HALF_PAIR.search(json.dumps(row, ensure_ascii=False)):
            raise RowFlaw("", "holds half of a surrogate pair, which is no text")
        if not isinstance(row, dict):
            raise RowFlaw("", f"must be an object with named fields, got {text[:80]}")
        return self._parse_row(row, filled)

    def _controls_in(self, sample: Any) -> list[str]:
        """Control tokens in the texts of a sample, each once.

        Raises:
            ControlFlaw: there are some which texts may not hold.
        """
        texts, rendered = list(self._texts(sample)), list(self._rendered(sample))
        everything = [*texts, *rendered]
        checked, allowed = (everything, everything) if self.controls.as_text else (texts, rendered)
        refused = [(name, token) for name, text in checked for token in self.controls.refused.findall(text)]
        if refused:
            name, token = refused[0]
            reason = f"holds the control token {token!r}, {self.controls.reason}"
            tokens = list(dict.fromkeys(token for _, token in refused))
            raise ControlFlaw(self.rules.fields.get(name, name), reason, tokens)
        return list(dict.fromkeys(token for _, text in allowed for token in self.controls.known.findall(text)))


def _key(content: bytes) -> int:
    """Hash of a content, the same in every process."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


def _unusable(flaws: Sequence[str]) -> str:
    """The message for rows that cannot be used, given their places and reasons."""
    if len(flaws) == 1:
        return f"{flaws[0]}; fix it, or set data.bad_rows to skip"
    shown = first_lines(flaws, MOST_SHOWN)
    return f"{len(flaws)} of the rows read so far cannot be used:{shown}\nfix them, or set data.bad_rows to skip"
