"""Examples of causal language modelling: token ids and the spans that are trained."""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value
from transformers import PreTrainedTokenizerBase

from dora_dist.data.encoding.chat import ChatRenderer
from dora_dist.data.encoding.encoder import (
    IDS_ONLY,
    IGNORED,
    EncodingRules,
    RowEncoder,
    RowParser,
    Status,
)
from dora_dist.data.encoding.proof import THOUGHT_TAGS
from dora_dist.data.encoding.shorten import Shortener
from dora_dist.data.encoding.without_loss import Span, WithoutLoss
from dora_dist.data.reading.samples import UNTRAINED, WANTED, Chat, Document, Instruction, Pair, RowFlaw, Sample


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example.

    Attributes:
        ids: token ids.
        spans: start and end (excluded) of every run of trained tokens, one after the other: ``[3, 7, 12, 15]``.
        answer_start: number of tokens before the last answer, which the model is given when it must answer itself.
        answer: the last answer as its tokens are decoded, to compare a generated one with.
        num_removed: tokens that were cut off to make it fit.
    """

    ids: list[int]
    spans: list[int]
    answer_start: int
    answer: str
    num_removed: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """A sample on its way to an example.

    Attributes:
        sample: the sample.
        text: a conversation as the template renders it; empty for other samples.
        characters: start and end of the answers in the text.
        without_loss: start and end of characters that have no loss, whatever is trained.
    """

    sample: Sample
    text: str = ""
    characters: Sequence[Span] = ()
    without_loss: Sequence[Span] = ()


def labels_of(ids: Sequence[int], spans: Sequence[int]) -> list[int]:
    """Labels with :data:`IGNORED` outside the spans, and at the first position, which nothing predicts."""
    labels = [IGNORED] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    labels[:1] = [IGNORED] * len(labels[:1])
    return labels


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of plain prompts as in training: with the tokenizer's start token, which is not put before a prompt that
    begins with it, and without an end token."""
    rows = tokenizer(list(prompts), add_special_tokens=True, **IDS_ONLY)["input_ids"]
    start = tokenizer.bos_token_id
    if tokenizer("", add_special_tokens=True, **IDS_ONLY)["input_ids"][:1] == [start]:
        twice = [
            ids[1:2] == [start] and prompt.startswith(tokenizer.bos_token)
            for prompt, ids in zip(prompts, rows, strict=True)
        ]
        rows = [ids[1:] if is_twice else ids for ids, is_twice in zip(rows, twice, strict=True)]
    return [_without_end(ids, tokenizer.eos_token_id) for ids in rows]


def _without_end(ids: list[int], end: int | None) -> list[int]:
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return ids


def _is_inside_a_token(offsets: Sequence[tuple[int, int]], place: int) -> bool:
    """Whether a token covers the characters on both sides of a place."""
    number = bisect.bisect_right(offsets, place, key=lambda offset: offset[1])
    return number < len(offsets) and offsets[number][0] < place


def _tokens_in(offsets: Sequence[tuple[int, int]], first: int, last: int) -> Span:
    """Tokens of the characters from ``first`` to ``last``: a token across a border belongs to what follows it."""
    begin, end = (bisect.bisect_right(offsets, place, key=lambda offset: offset[1]) for place in (first, last))
    return begin, end


def _outside(runs: Iterable[Span], masked: Sequence[Span]) -> list[int]:
    """Runs of tokens without masked ones, both given in order; the starts and ends of what is left, one by one."""
    left: list[int] = []
    for start, end in runs:
        for first, last in masked:
            if max(first, start) < min(last, end):
                left += [start, first] * (start < first)
                start = last
        left += [start, end] * (start < end)
    return left


class TextEncoder(RowEncoder[_Part, Encoded]):
    """Text for a causal language model, of which some tokens are trained.

    Args:
        tokenizer: the model's, with an end-of-sequence token.
        rules: how rows become examples.
        parse: see :class:`RowEncoder`.

    Raises:
        ValueError: the tokenizer has no end token, the chat template cannot be used, or a text of the configuration
            holds a control token where it is text.
    """

    columns: ClassVar[dict[str, Any]] = {
        "input_ids": List(Value("int32")),
        "spans": List(Value("int32")),
        "answer_start": Value("int32"),
        "answer": Value("string"),
    }

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules, parse: RowParser) -> None:
        super().__init__(tokenizer, rules, parse)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so the model could not learn where to stop")
        self._check_own_texts()
        self.renderer = ChatRenderer(tokenizer, rules.template, self.controls) if rules.template is not None else None

    def _check_own_texts(self) -> None:
        """Refuse control tokens in texts of the configuration, which stand in every row. A plain prompt may hold some,
        unless they are to be text."""
        rules, controls = self.rules, self.controls
        advice = "leave it out, or set data.control_tokens to " + ("refuse" if controls.as_text else "text")
        checked = [("system", rules.system, controls.refused, controls.reason)]
        if rules.as_chat:
            checked.append(("prompt", rules.prompt or "", controls.refused, controls.reason))
        elif controls.as_text:
            checked.append(("prompt", rules.prompt or "", controls.known, "which data.control_tokens: text makes text"))
        for name, text, pattern, reason in checked:
            if found := pattern.search(text):
                raise ValueError(f"data.{name} is {text!r}, with the control token {found[0]!r}, {reason}: {advice}")

    def _content(self, example: Encoded | None) -> dict[str, Any]:
        example = example or Encoded([], [], 0, "")
        return {
            "input_ids": example.ids,
            "spans": example.spans,
            "answer_start": example.answer_start,
            "answer": example.answer,
            "removed": example.num_removed,
        }

    def _hashed(self, content: Mapping[str, Any]) -> bytes:
        ids, spans = content["input_ids"], content["spans"]
        return np.array([len(ids), *ids, *spans], dtype=np.int64).tobytes()

    def _num_trimmed(self, part: _Part) -> int:
        return part.sample.num_trimmed if isinstance(part.sample, Chat) else 0

    def _unread(self, part: _Part) -> Sequence[str]:
        if not isinstance(part.sample, Chat) or self.renderer is None:
            return ()
        wanted = [] if self.rules.train_on == "everything" else [m for m in part.sample.messages if WANTED in m]
        marks = dict.fromkeys(f"{m[WANTED]} of the role {m['role']}" for m in wanted)
        return [*part.sample.unread, *marks, *self.renderer.unwritten(part.sample)]

    def _parse(self, text: str, flaw: str, filled: bool) -> tuple[Any, list[str]]:
        sample, unread = super()._parse(text, flaw, filled)
        if isinstance(sample, Chat) and self.renderer is not None:
            sample = self.renderer.joined(sample)
        return sample, unread

    def _texts(self, sample: Sample) -> Iterable[tuple[str, str]]:
        if isinstance(sample, Chat):
            parts = [(f"messages[{n}].{name}", part) for n, m in enumerate(sample.messages) for name, part in m.items()]
            for name, part in [*parts, ("tools", sample.tools), ("chat_template_kwargs", sample.options)]:
                if not name.endswith(".role"):
                    yield name, part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
        elif isinstance(sample, Instruction):
            yield from (("instruction", sample.instruction), ("input", sample.context), ("system", sample.system))
            yield from (("history", text) for exchange in sample.history for text in exchange)
            yield "output", self._answer(sample)
        elif isinstance(sample, Pair):
            yield "completion", self._answer(sample)
            if self.rules.as_chat:
                yield "prompt", sample.prompt

    def _rendered(self, sample: Sample) -> Iterable[tuple[str, str]]:
        if isinstance(sample, Document):
            yield "text", sample.text
        elif isinstance(sample, Pair) and not self.rules.as_chat:
            yield "prompt", sample.prompt

    def _answer(self, sample: Instruction | Pair) -> str:
        """The answer without the end token that it may have already, which would be text in a conversation."""
        if self.controls.as_text or self.rules.as_chat:
            return sample.completion
        return sample.completion.rstrip().removesuffix(self.tokenizer.eos_token)

    def _as_rendered(self, sample: Sample) -> Sample:
        """The sample as a conversation, where it goes into the chat template, with the system message of all.

        Raises:
            RowFlaw: its answer is empty, or a part of it has no place.
        """
        if isinstance(sample, Instruction | Pair) and not self._answer(sample).strip():
            name = "output" if isinstance(sample, Instruction) else "completion"
            raise RowFlaw(name, "is nothing but the end token, so that there is nothing to learn from it")
        if isinstance(sample, Instruction):
            for name in ("system", "history"):
                if getattr(sample, name) and not self.rules.as_chat:
                    raise RowFlaw(name, "has no place under Alpaca's headings: set data.as_chat: true")
        if isinstance(sample, Instruction | Pair) and self.rules.as_chat:
            sample = sample.as_chat()
        if isinstance(sample, Chat) and self.rules.system and sample.messages[0]["role"] != "system":
            return replace(sample, messages=[{"role": "system", "content": self.rules.system}, *sample.messages])
        return sample

    def _parts(self, sample: Sample) -> list[_Part]:
        """A conversation is rendered; one whose earlier turns the template rewrites becomes a part for every answer."""
        sample = self._as_rendered(sample)
        if not isinstance(sample, Chat):
            self._check_plain_thoughts(sample)
            return [_Part(sample)]
        assert self.renderer is not None
        rendered = self.renderer.spans(sample, last_only=self.rules.train_on != "assistant")
        if rendered is not None:
            return [_Part(sample, *rendered, self._without_loss(sample, *rendered))]
        chats = [replace(sample, messages=sample.messages[: number + 1]) for number in sample.answers()]
        ends = [(chat, *self.renderer.last_span(chat)) for chat in chats]
        return [_Part(chat, text, spans, self._without_loss(chat, text, spans)) for chat, text, spans in ends]

    def _check_plain_thoughts(self, sample: Sample) -> None:
        """Refuse plain text with thoughts that are to have no loss: no template says where they are."""
        if self.rules.thoughts:
            return
        for name, text in (*self._texts(sample), *self._rendered(sample)):
            if found := THOUGHT_TAGS.search(text):
                raise RowFlaw(
                    name,
                    f"holds {found[0]}, but data.train_on_thoughts is false, which is for conversations: set "
                    "data.as_chat: true, or leave the thought out",
                )

    def _without_loss(self, chat: Chat, text: str, spans: Sequence[Span]) -> list[Span]:
        """Characters of a rendered conversation that have no loss: thoughts of answers, where the run leaves them out,
        and where everything is trained the messages that are not to be.

        Raises:
            RowFlaw: they cannot be told from the rest.
        """
        assert self.renderer is not None
        found, everything = WithoutLoss(self.renderer.render), self.rules.train_on == "everything"
        trained = dict(zip(chat.answers()[-len(spans) :], spans, strict=True))
        masked: list[Span] = []
        for number, message in enumerate(chat.messages):
            untrained, is_answer = UNTRAINED in message, message["role"] == "assistant"
            if not is_answer and untrained and everything:
                masked.append(found.content(chat, number, text))
            if not is_answer or not (everything or number in trained) or (self.rules.thoughts and not untrained):
                continue
            turn = trained.get(number) or self.renderer.turn(chat, number, text)
            if turn is None:
                raise RowFlaw(
                    f"messages[{number}]",
                    "is rendered otherwise once more messages follow, so that its loss cannot be left out where "
                    "data.train_on is everything: set that to assistant",
                )
            masked.append(turn if untrained else found.thought(chat, number, text, turn[0]))
        return masked

    def _encode(self, parts: Sequence[_Part]) -> list[Encoded | RowFlaw]:
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

    def _encode_pairs(self, pairs: Sequence[Pair]) -> list[Encoded | RowFlaw]:
        end = self.tokenizer.eos_token_id
        prompts = encode_prompts(self.writer, [pair.prompt for pair in pairs])
        answers = self.writer([pair.completion for pair in pairs], add_special_tokens=False, **IDS_ONLY)["input_ids"]
        rows = [[*_without_end(answer, end), end] for answer in answers]
        return [
            Encoded(prompt + answer, [first, len(prompt) + len(answer)], len(prompt), self._decoded(answer))
            for prompt, answer in zip(prompts, rows, strict=True)
            for first in [0 if self.rules.train_on == "everything" else len(prompt)]
        ]

    def _decoded(self, answer: list[int]) -> str:
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _encode_documents(self, documents: Sequence[Document]) -> list[Encoded | RowFlaw]:
        rows = encode_prompts(self.writer, [document.text for document in documents])
        rows = [[*ids, self.tokenizer.eos_token_id] for ids in rows]
        return [Encoded(ids, [0, len(ids)], 0, "") for ids in rows]

    def _encode_chats(self, parts: Sequence[_Part]) -> Iterator[Encoded | RowFlaw]:
        encoded = self.writer(
            [part.text for part in parts], add_special_tokens=False, return_offsets_mapping=True, **IDS_ONLY
        )
        for part, ids, offsets in zip(parts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            try:
                if any(_is_inside_a_token(offsets, start) for start, _ in part.characters):
                    ids, offsets = self._encode_apart(part, ids)
                spans = self._token_spans(ids, offsets, part.characters)
            except RowFlaw as flaw:
                yield flaw
                continue
            start, end = spans[-1]
            runs = [(0, len(ids))] if self.rules.train_on == "everything" else spans
            masked = [_tokens_in(offsets, first, last) for first, last in part.without_loss]
            yield Encoded(ids, _outside(runs, masked), start, self._decoded(ids[start:end]))

    def _encode_apart(self, part: _Part, together: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens and offsets of a conversation whose prompts and answers are encoded apart, since a token would cover
        the border between them: a prompt is encoded as it will be when it is given alone.

        Raises:
            RowFlaw: encoded apart, it is another text.
        """
        borders = [0, *(start for start, _ in part.characters), len(part.text)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for first, last in itertools.pairwise(borders):
            piece = part.text[first:last]
            encoded = self.writer(piece, add_special_tokens=False, return_offsets_mapping=True, **IDS_ONLY)
            ids += encoded["input_ids"]
            offsets += [(first + start, first + end) for start, end in encoded["offset_mapping"]]
        if self.tokenizer.decode(ids) != self.tokenizer.decode(together):
            raise RowFlaw(
                "messages",
                "begins an answer with characters that the tokenizer joins with what stands before it, and cannot "
                "write apart",
            )
        return ids, offsets

    def _token_spans(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], characters: Sequence[tuple[int, int]]
    ) -> list[Span]:
        """Tokens of spans of characters: all that overlap, up to and with the token that ends the turn."""
        assert self.renderer is not None
        starts, ends = np.array(offsets, dtype=np.int64).T
        spans: list[Span] = []
        for first, last in characters:
            begin = int(np.searchsorted(ends, first, side="right"))
            stop = int(np.searchsorted(starts, last, side="left"))
            inside = [n for n in range(begin, min(stop + 1, len(ids))) if ids[n] in self.renderer.ends]
            if not inside:
                raise RowFlaw(
                    "messages",
                    "is rendered with a turn of the assistant that ends without "
                    f"{self.tokenizer.convert_ids_to_tokens(self.renderer.end_of_turn)!r}, which ends others: set "
                    "data.chat_template to one that ends all alike",
                )
            if len(early := [ids[n] for n in inside if n < stop]) > 1:
                raise RowFlaw(
                    "messages",
                    f"is rendered with {self.tokenizer.convert_ids_to_tokens(early[0])!r} in the middle of an answer, "
                    "where generation would stop: set data.chat_template to one that ends answers only with it",
                )
            spans.append((begin, inside[-1] + 1))
        return spans

    def _fit(self, part: _Part, example: Encoded, place: str) -> tuple[Encoded | None, Status, str]:
        """See :meth:`RowEncoder._fit`; truncation is :meth:`_shorten`."""
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
            shorter = Shortener(self.writer).with_less(sample, len(example.ids) - most)
            if shorter is None:
                return None
            sample = shorter
            try:
                (shorter_example,) = self._encode(self._parts(sample)[-1:])
            except RowFlaw:
                return None
            if isinstance(shorter_example, RowFlaw):
                return None
            example = shorter_example
        return replace(example, num_removed=whole - len(example.ids))
