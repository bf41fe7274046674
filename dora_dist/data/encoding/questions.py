"""Extractive question answering: windows over a context, the tokens of an answer in them, and answers from logits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value
from transformers import BatchEncoding, PreTrainedTokenizerBase

from dora_dist.data.encoding.encoder import EncodingRules, RowEncoder, RowParser, Status
from dora_dist.data.reading.samples import Question, RowFlaw

OUTSIDE = (-1, -1)
"""Stands for the characters of a token that is not part of the context."""


@dataclass(frozen=True, slots=True)
class Window:
    """A question with a part of its context, as the model is given it.

    Attributes:
        ids: token ids, with the tokenizer's own tokens around and between the two texts.
        types: number of the text that each token belongs to, where the model is told; otherwise empty.
        offsets: first character of every token in the context, and the one after its last; :data:`OUTSIDE` for tokens
            that are not part of the context.
        null: position of the token that stands for no answer (CLS).
        start: position of the answer's first token; :attr:`null` where this window does not hold the whole answer.
        end: position of its last token (included), or :attr:`null`.
    """

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    null: int
    start: int
    end: int


class ContextWindows:
    """Cuts contexts into windows that overlap, so that an answer is whole in at least one of them where it is not
    longer than the overlap.

    Args:
        tokenizer: a fast one (which knows the characters of a token), with a CLS or start token.
        max_length: longest window in tokens, with question and the tokenizer's own tokens.
        stride: tokens of the context that neighbouring windows share (the ``stride`` of Hugging Face's tokenizers, not
            BERT's ``doc_stride``, which counts from start to start).

    Raises:
        ValueError: the tokenizer cannot be used, or ``stride`` is negative.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not know which characters a token stands for, which answers are "
                "found by: question answering needs a model with a fast tokenizer (tokenizer.json)"
            )
        null_id = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        if null_id is None:
            raise ValueError("the tokenizer has neither a CLS nor a start token, which would stand for no answer")
        if stride < 0:
            raise ValueError(f"data.stride is {stride}, but must be at least 0")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.stride = stride
        self._null_id = null_id
        self._with_types = "token_type_ids" in tokenizer.model_input_names

    def __call__(self, question: Question) -> list[Window]:
        """The windows of a question, in the order of the context; all of them together hold all of it.

        Raises:
            RowFlaw: the question leaves too little room, the context has no token, or the tokens of the answer are
                not those of its text.
        """
        encoded = self.tokenizer(
            question.question.strip(),
            question.context,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=self._with_types,
            verbose=False,
        )
        ids = encoded["input_ids"]
        of_context = [number for number, text in enumerate(encoded.sequence_ids()) if text == 1]
        if not of_context:
            raise RowFlaw("context", "has no token")
        context = range(of_context[0], of_context[-1] + 1)
        around = [number for number in range(len(ids)) if number not in context]
        room = self._room(len(around))
        null = self._null_token({number: ids[number] for number in around})
        answer = self._answer_tokens(question, encoded["offset_mapping"], context)
        return [
            _window(encoded, context, part, null, answer)
            for part in _overlapping_parts(context, size=room, step=room - self.stride)
        ]

    def _room(self, num_around: int) -> int:
        """Number of tokens of the context that a window holds beside ``num_around`` others.

        Raises:
            RowFlaw: it is not more than neighbouring windows share.
        """
        room = self.max_length - num_around
        if room <= self.stride:
            raise RowFlaw(
                "question",
                f"leaves {max(room, 0)} of data.max_length {self.max_length} tokens to the context, of which "
                f"neighbouring windows share {self.stride} (data.stride): it must leave more than that",
            )
        return room

    def _null_token(self, around: Mapping[int, int]) -> int:
        """Position of the token that stands for no answer.

        Args:
            around: the tokens that are not part of the context, position -> id.

        Raises:
            ValueError: it is not among them.
        """
        for position, token in around.items():
            if token == self._null_id:
                return position
        name = self.tokenizer.convert_ids_to_tokens(self._null_id)
        raise ValueError(
            f"the tokenizer does not put {name!r}, which would stand for no answer, around a question and its context"
        )

    def _answer_tokens(
        self, question: Question, offsets: Sequence[tuple[int, int]], context: range
    ) -> tuple[int, int] | None:
        """First and last token of the answer to learn: all tokens that overlap it; None where there is no answer."""
        if not question.answers:
            return None
        text, begin = question.answers[0].strip(), question.starts[0]
        begin += len(question.answers[0]) - len(question.answers[0].lstrip())
        inside = [n for n in context if offsets[n][1] > begin and offsets[n][0] < begin + len(text)]
        covered = question.context[offsets[inside[0]][0] : offsets[inside[-1]][1]] if inside else ""
        if not inside or _letters(text) not in _letters(covered):
            raise RowFlaw("answers.text[0]", f"is {text!r}, but its tokens stand for {covered!r}")
        return inside[0], inside[-1]


def _overlapping_parts(whole: range, size: int, step: int) -> Iterator[range]:
    """Parts of ``size`` that begin every ``step``; the last one, which may be smaller, ends where the whole does."""
    for begin in whole[::step]:
        part = range(begin, min(begin + size, whole.stop))
        yield part
        if part.stop == whole.stop:
            return


def _window(encoded: BatchEncoding, context: range, part: range, null: int, answer: tuple[int, int] | None) -> Window:
    """The window over one part of the context.

    Args:
        encoded: question and whole context, encoded together.
        context: positions of the context's tokens.
        part: positions of those in this window.
        null: position of the token that stands for no answer.
        answer: positions of the answer's first and last token; None where there is no answer.
    """
    ids, types, offsets = encoded["input_ids"], encoded.get("token_type_ids", []), encoded["offset_mapping"]
    chosen = [*range(context.start), *part, *range(context.stop, len(ids))]
    start, end = answer if answer is not None and answer[0] in part and answer[1] in part else (null, null)
    return Window(
        ids=[ids[n] for n in chosen],
        types=[types[n] for n in chosen] if types else [],
        offsets=[tuple(offsets[n]) if n in context else OUTSIDE for n in chosen],
        null=chosen.index(null),
        start=chosen.index(start),
        end=chosen.index(end),
    )


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


@dataclass(frozen=True, slots=True)
class AskedWindow:
    """A window with its question."""

    question: Question
    window: Window


class QuestionEncoder(RowEncoder[AskedWindow, AskedWindow]):
    """Windows of questions, one example each; all windows of a row stand one after the other, under one ``place``.

    Raises:
        ValueError: see :class:`ContextWindows`.
    """

    columns: ClassVar[dict[str, Any]] = {
        "input_ids": List(Value("int32")),
        "token_type_ids": List(Value("int8")),
        "offsets": List(Value("int32")),  # first and last of every token, one after the other
        "null": Value("int32"),
        "start": Value("int32"),
        "end": Value("int32"),
        "context": Value("string"),
        "answers": List(Value("string")),
    }

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules, parse: RowParser) -> None:
        super().__init__(tokenizer, rules, parse)
        self._windows = ContextWindows(self.writer, rules.max_length, rules.stride)

    def _texts(self, sample: Question) -> list[tuple[str, str]]:
        return [("question", sample.question), ("context", sample.context)]

    def _parts(self, sample: Question) -> list[AskedWindow]:
        return [AskedWindow(sample, window) for window in self._windows(sample)]

    def _encode(self, parts: Sequence[AskedWindow]) -> Sequence[AskedWindow]:
        return parts

    def _fit(self, part: AskedWindow, example: AskedWindow, place: str) -> tuple[AskedWindow | None, Status, str]:
        return example, Status.KEPT, ""

    def _content(self, example: AskedWindow | None) -> dict[str, Any]:
        example = example or AskedWindow(Question("", "", (), ()), Window([], [], [], 0, 0, 0))
        window = example.window
        return {
            "input_ids": window.ids,
            "token_type_ids": window.types,
            "offsets": [place for pair in window.offsets for place in pair],
            "null": window.null,
            "start": window.start,
            "end": window.end,
            "context": example.question.context,
            "answers": list(example.question.answers),
            "removed": 0,
        }

    def _hashed(self, content: Mapping[str, Any]) -> bytes:
        ids = content["input_ids"]
        return np.array([len(ids), *ids, content["start"], content["end"]], dtype=np.int64).tobytes()
