"""Token ids of rows, and which of them are trained."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from hashlib import blake2b
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from datasets import List, Value
from transformers import PreTrainedTokenizerBase

from dora_dist.data.encoding.chat import NO_TEXT, ChatRenderer, control_pattern
from dora_dist.data.encoding.shorten import Shortener
from dora_dist.data.reading.row_formats import (
    FORMATS,
    Chat,
    Document,
    Instruction,
    Pair,
    RowFlaw,
    Sample,
    rename_fields,
)

IGNORED = -100
"""Label of a position without loss, as in PyTorch's cross-entropy."""


IDS_ONLY = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
"""A third of the time would go into masks that nobody reads; lengths are checked here, not by the tokenizer."""
BOOKKEEPING = {
    "removed": Value("int32"),
    "key": Value("int64"),
    "place": Value("string"),
    "status": Value("int8"),
    "note": Value("string"),
    "trimmed": Value("int32"),
}
"""Columns that examples of every kind have beside their own."""


class UnusableRowError(ValueError):
    """A row that cannot be used, under the policy ``error``."""


class Status(IntEnum):
    """What became of a row."""

    KEPT = 0
    BAD = 1
    OVERLONG = 2


@dataclass(frozen=True, kw_only=True)
class EncodingRules:
    """All that decides, beside tokenizer and rows, what a row becomes.

    Attributes:
        format: a name of :data:`~dora_dist.data.reading.row_formats.FORMATS`.
        fields: the format's name of a field -> the rows' own, where they differ.
        as_chat: put alpaca rows into the chat template too.
        template: Jinja source, or None where no row needs one.
        train_on: ``assistant`` (all turns), ``last`` (turn) or ``everything``.
        max_length: longest example in tokens.
        overlong: ``error``, ``drop`` or ``truncate``.
        bad_rows: ``error`` or ``skip``.
        labels: ``classes`` or ``regression``.
        stride: tokens of a context that neighbouring windows share (questions).
        max_target_length: longest summary in tokens.
    """

    format: str
    fields: Mapping[str, str] = field(default_factory=dict)
    as_chat: bool = False
    template: str | None = None
    train_on: str = "assistant"
    max_length: int = 2048
    overlong: str = "error"
    bad_rows: str = "error"
    labels: str = "classes"
    stride: int = 128
    max_target_length: int = 128


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example.

    Attributes:
        ids: token ids.
        spans: start and end (excluded) of every run of trained tokens, one after the other: ``[3, 7, 12, 15]``.
        answer: the last answer as text, to compare a generated one with.
        num_removed: tokens that were cut off to make it fit.
    """

    ids: list[int]
    spans: list[int]
    answer: str
    num_removed: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """A sample on its way to an example.

    Attributes:
        sample: what is encoded.
        text: a conversation as the template renders it.
        characters: the assistant's in it.
    """

    sample: Sample
    text: str = ""
    characters: Sequence[tuple[int, int]] = ()


def labels_of(ids: Sequence[int], spans: Sequence[int]) -> list[int]:
    """Labels with :data:`IGNORED` outside the spans, and at the first position, which nothing predicts."""
    labels = [IGNORED] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    labels[:1] = [IGNORED] * len(labels[:1])
    return labels


def prompt_length(spans: Sequence[int]) -> int:
    """Tokens before the last run of trained ones: what the model is given when it must answer itself."""
    return spans[-2]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of plain prompts as in training: with the tokenizer's start token, without an end token."""
    rows = tokenizer(list(prompts), add_special_tokens=True, **IDS_ONLY)["input_ids"]
    return [_without_end(ids, tokenizer.eos_token_id) for ids in rows]


def _without_end(ids: list[int], end: int | None) -> list[int]:
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return ids


_HALF_PAIR = re.compile("[\ud800-\udfff]")


P = TypeVar("P")
E = TypeVar("E")


class RowEncoder(ABC, Generic[P, E]):
    """Turns rows into examples, many at a time; the same rows give the same examples in any process.

    A row is parsed to a sample, which becomes one part or several; the parts of many rows are encoded together, and
    each is made to fit.

    Args:
        tokenizer: of the model.
        rules: see there.

    Attributes:
        columns: what an example consists of, with the types of its columns; ``input_ids`` is one of them.
    """

    columns: ClassVar[dict[str, Any]]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules) -> None:
        self.tokenizer = tokenizer
        self.rules = rules
        self._control = control_pattern(tokenizer)

    def __call__(self, batch: Mapping[str, list[str]]) -> dict[str, list[Any]]:
        """Encode a batch of rows for ``Dataset.map(batched=True)``.

        Args:
            batch: columns ``place``, ``json``, ``flaw`` of :class:`~dora_dist.data.reading.files.RawRow`.

        Returns:
            Columns of examples, with one line too for each row that became none: :attr:`columns`, and ``removed``
            (tokens that were cut off), ``key`` (a hash of the example), ``place``, ``status``, ``note``, ``trimmed``
            (messages left out after the assistant's last).

        Raises:
            UnusableRowError: a row cannot be used, under the policy ``error``.
        """
        columns: dict[str, list[Any]] = {name: [] for name in (*self.columns, *BOOKKEEPING)}
        found: list[tuple[str, P | RowFlaw]] = []
        for place, text, flaw in zip(batch["place"], batch["json"], batch["flaw"], strict=True):
            try:
                found += [(place, part) for part in self._parts(self._parse(text, flaw))]
            except RowFlaw as error:
                if self.rules.bad_rows == "error":
                    raise UnusableRowError(f"{place}: {error}; mend it, or set data.bad_rows to skip") from None
                found.append((place, error))
        encoded = iter(self._encode([part for _, part in found if not isinstance(part, RowFlaw)]))
        for place, part in found:
            if isinstance(part, RowFlaw):
                example, status, note = None, Status.BAD, str(part)
            else:
                example, status, note = self._fit(part, next(encoded), place)
            content = self._content(example)
            for name, value in content.items():
                columns[name].append(value)
            columns["key"].append(_key(self._hashed(content)))
            columns["place"].append(place)
            columns["status"].append(int(status))
            columns["note"].append(note)
            columns["trimmed"].append(0 if isinstance(part, RowFlaw) else self._num_trimmed(part))
        return columns

    @abstractmethod
    def _parts(self, sample: Any) -> list[P]:
        """What is encoded of a sample.

        Raises:
            RowFlaw: it cannot be used.
        """

    @abstractmethod
    def _encode(self, parts: Sequence[P]) -> Sequence[E]:
        """Examples of parts, without a look at their length."""

    @abstractmethod
    def _fit(self, part: P, example: E, place: str) -> tuple[E | None, Status, str]:
        """The example within ``max_length`` as the policy for longer ones wants it, and why it is not there."""

    @abstractmethod
    def _content(self, example: E | None) -> dict[str, Any]:
        """Values of :attr:`columns`, and ``removed``; empty ones for None."""

    @abstractmethod
    def _hashed(self, content: Mapping[str, Any]) -> bytes:
        """What makes the example the one it is."""

    def _num_trimmed(self, part: P) -> int:
        return 0

    def _too_long(self, length: int, place: str, rule: str = "max_length") -> str:
        """Note on an example that is longer than a rule allows.

        Raises:
            UnusableRowError: under the policy ``error``.
        """
        note = f"{length} tokens, more than data.{rule} {getattr(self.rules, rule)}"
        if self.rules.overlong == "error":
            raise UnusableRowError(
                f"{place} has {note}: raise it, or set data.overlong to drop or truncate (what the tokens are: "
                "python -m dora_dist.preview)"
            )
        return note

    def _parse(self, text: str, flaw: str) -> Any:
        """The sample that a row describes.

        Raises:
            RowFlaw: it describes none.
        """
        if flaw:
            raise RowFlaw("", flaw)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and nesting as deep
            raise RowFlaw("", f"cannot be read as JSON: {error}") from None
        if "\\u" in text and _HALF_PAIR.search(json.dumps(row, ensure_ascii=False)):
            raise RowFlaw("", "holds half of a surrogate pair, which is no text")
        if not isinstance(row, dict):
            raise RowFlaw("", f"must be an object with named fields, got {text[:80]}")
        try:
            return FORMATS[self.rules.format].parse(rename_fields(row, self.rules.fields))
        except RowFlaw as error:
            raise RowFlaw(self.rules.fields.get(error.field, error.field), error.reason) from None

    def _check_controls(self, name: str, text: str) -> None:
        if found := self._control.search(text):
            raise RowFlaw(self.rules.fields.get(name, name), f"holds the control token {found[0]!r}, {NO_TEXT}")


class Encoder(RowEncoder[_Part, Encoded]):
    """Text for a causal language model, of which some tokens are trained.

    Args:
        tokenizer: with an end-of-sequence token.
        rules: see there.

    Raises:
        ValueError: the tokenizer has no end token, or the chat template cannot be used.
    """

    columns: ClassVar[dict[str, Any]] = {
        "input_ids": List(Value("int32")),
        "spans": List(Value("int32")),
        "answer": Value("string"),
    }

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules) -> None:
        super().__init__(tokenizer, rules)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so the model could not learn where to stop")
        self.renderer = ChatRenderer(tokenizer, rules.template) if rules.template is not None else None

    def _content(self, example: Encoded | None) -> dict[str, Any]:
        example = example or Encoded([], [], "")
        return {
            "input_ids": example.ids,
            "spans": example.spans,
            "answer": example.answer,
            "removed": example.num_removed,
        }

    def _hashed(self, content: Mapping[str, Any]) -> bytes:
        ids, spans = content["input_ids"], content["spans"]
        return np.array([len(ids), *ids, *spans], dtype=np.int64).tobytes()

    def _num_trimmed(self, part: _Part) -> int:
        return part.sample.num_trimmed if isinstance(part.sample, Chat) else 0

    def _parse(self, text: str, flaw: str) -> Sample:
        sample: Sample = super()._parse(text, flaw)
        if isinstance(sample, Instruction):
            for name, part in (("instruction", sample.instruction), ("input", sample.context)):
                self._check_controls(name, part)
        if isinstance(sample, Instruction | Pair):
            name = "output" if isinstance(sample, Instruction) else "completion"
            answer = sample.completion.rstrip().removesuffix(self.tokenizer.eos_token)
            if not answer.strip():
                raise RowFlaw(name, "is nothing but the end token, so that there is nothing to learn from it")
            self._check_controls(name, answer)
        if isinstance(sample, Instruction):
            return sample.as_chat() if self.rules.as_chat else sample
        return sample

    def _parts(self, sample: Sample) -> list[_Part]:
        """A conversation is rendered; one whose earlier turns the template rewrites becomes a part for every answer."""
        if not isinstance(sample, Chat):
            return [_Part(sample)]
        assert self.renderer is not None
        rendered = self.renderer.spans(sample, last_only=self.rules.train_on != "assistant")
        if rendered is not None:
            return [_Part(sample, *rendered)]
        ends = [number + 1 for number, message in enumerate(sample.messages) if message["role"] == "assistant"]
        parts = [replace(sample, messages=sample.messages[:end]) for end in ends]
        return [_Part(part, *self.renderer.last_span(part)) for part in parts]

    def _encode(self, parts: Sequence[_Part]) -> list[Encoded]:
        """Examples of parts of one kind, without a look at their length."""
        if not parts:
            return []
        if parts[0].text:
            return list(self._encode_chats(parts))
        samples = [part.sample for part in parts]
        if documents := [sample for sample in samples if isinstance(sample, Document)]:
            return self._encode_documents(documents)
        instructions = [sample.as_pair() if isinstance(sample, Instruction) else sample for sample in samples]
        return self._encode_pairs([sample for sample in instructions if isinstance(sample, Pair)])

    def _encode_pairs(self, pairs: Sequence[Pair]) -> list[Encoded]:
        end = self.tokenizer.eos_token_id
        prompts = encode_prompts(self.tokenizer, [pair.prompt for pair in pairs])
        answers = self.tokenizer([pair.completion for pair in pairs], add_special_tokens=False, **IDS_ONLY)["input_ids"]
        examples = []
        for pair, prompt, answer in zip(pairs, prompts, answers, strict=True):
            ids = prompt + _without_end(answer, end) + [end]
            start = 0 if self.rules.train_on == "everything" else len(prompt)
            text = pair.completion.rstrip().removesuffix(self.tokenizer.eos_token)  # as a generated answer is decoded
            examples.append(Encoded(ids, [start, len(ids)], text))
        return examples

    def _encode_documents(self, documents: Sequence[Document]) -> list[Encoded]:
        rows = encode_prompts(self.tokenizer, [document.text for document in documents])
        rows = [[*ids, self.tokenizer.eos_token_id] for ids in rows]
        return [Encoded(ids, [0, len(ids)], "") for ids in rows]

    def _encode_chats(self, parts: Sequence[_Part]) -> Iterator[Encoded]:
        encoded = self.tokenizer(
            [part.text for part in parts], add_special_tokens=False, return_offsets_mapping=True, **IDS_ONLY
        )
        for part, ids, offsets in zip(parts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            assert isinstance(part.sample, Chat)
            spans = [0, len(ids)]
            if self.rules.train_on != "everything":
                spans = self._token_spans(ids, offsets, part.characters)
            yield Encoded(ids, spans, part.sample.messages[-1].get("content", ""))

    def _token_spans(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], characters: Sequence[tuple[int, int]]
    ) -> list[int]:
        """From characters to tokens: all that overlap, up to and with the token that ends the turn."""
        assert self.renderer is not None
        starts, ends = np.array(offsets, dtype=np.int64).T
        spans: list[int] = []
        for first, last in characters:
            begin = int(np.searchsorted(ends, first, side="right"))
            stop = int(np.searchsorted(starts, last, side="left"))
            inside = [n for n in range(begin, min(stop + 1, len(ids))) if ids[n] == self.renderer.end_of_turn]
            if not inside:
                raise UnusableRowError(
                    "the chat template ends some turns of the assistant without "
                    f"{self.tokenizer.convert_ids_to_tokens(self.renderer.end_of_turn)!r}, which ends others: set "
                    "data.chat_template to one that ends all alike"
                )
            spans += [begin, inside[-1] + 1]
        return spans

    def _fit(self, part: _Part, example: Encoded, place: str) -> tuple[Encoded | None, Status, str]:
        """The example within ``max_length``, as the policy for longer ones wants it."""
        most = self.rules.max_length
        if len(example.ids) <= most:
            return example, Status.KEPT, ""
        note = self._too_long(len(example.ids), place)
        if self.rules.overlong == "truncate":
            shorter = self._shorten(part.sample, example)
            if shorter is not None:
                return shorter, Status.KEPT, ""
            note += ", and the answer alone is too long"
        return None, Status.OVERLONG, note

    def _shorten(self, sample: Sample, example: Encoded) -> Encoded | None:
        """Make an example fit by cutting what the model is given, never what it should learn to answer.

        A document loses its end. A conversation first loses its oldest exchanges; then, as in a pair, the longest
        text before the answer loses its middle, so that a question is kept at either end of a long context.
        """
        most, whole = self.rules.max_length, len(example.ids)
        if isinstance(sample, Document):
            return replace(example, ids=example.ids[:most], spans=[0, most], num_removed=whole - most)
        while len(example.ids) > most:
            shorter = Shortener(self.tokenizer).with_less(sample, len(example.ids) - most)
            if shorter is None:
                return None
            sample = shorter
            try:
                (example,) = self._encode(self._parts(sample)[-1:])
            except RowFlaw:
                return None
        return replace(example, num_removed=whole - len(example.ids))


def _key(content: bytes) -> int:
    """The same for the same content, wherever it comes from."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)
