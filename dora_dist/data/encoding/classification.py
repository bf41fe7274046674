"""Sentences, or pairs of them, with a label each: examples of sequence classification and regression."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value
from transformers import PreTrainedTokenizerBase

from dora_dist.data.encoding.encoder import EncodingRules, RowEncoder, RowParser, Status
from dora_dist.data.reading.samples import Labelled, RowFlaw, shortened


@dataclass(frozen=True, slots=True)
class LabelledIds:
    """One example.

    Attributes:
        ids: token ids, with the tokenizer's own tokens around and between the sentences.
        types: number of the sentence that each token belongs to, where the model is told; otherwise empty.
        label: name of the class, or the number as text.
        num_removed: tokens that were cut off to make it fit.
    """

    ids: list[int]
    types: list[int]
    label: str
    num_removed: int = 0


class LabelledEncoder(RowEncoder[Labelled, LabelledIds]):
    """Sentences as the tokenizer puts them together, the label as it is written.

    Raises:
        ValueError: ``max_length`` leaves no room for a sentence.
    """

    columns: ClassVar[dict[str, Any]] = {
        "input_ids": List(Value("int32")),
        "token_type_ids": List(Value("int8")),
        "label": Value("string"),
    }

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules, parse: RowParser) -> None:
        super().__init__(tokenizer, rules, parse)
        own = tokenizer.num_special_tokens_to_add(pair=True)
        if rules.max_length <= own:
            raise ValueError(
                f"data.max_length is {rules.max_length}, but the tokenizer alone puts {own} tokens around two "
                "sentences: raise it"
            )
        self._with_types = "token_type_ids" in tokenizer.model_input_names

    def _texts(self, sample: Labelled) -> list[tuple[str, str]]:
        return [("sentence1", sample.first), ("sentence2", sample.second or "")]

    def _parts(self, sample: Labelled) -> list[Labelled]:
        read = number_label if self.rules.labels == "regression" else class_label
        return [replace(sample, label=read(sample.label))]

    def _encode(self, parts: Sequence[Labelled]) -> list[LabelledIds]:
        examples: dict[int, LabelledIds] = {}
        for paired in (False, True):  # a tokenizer takes pairs or single texts
            numbers = [n for n, part in enumerate(parts) if (part.second is not None) == paired]
            if numbers:
                found = self._tokenized([parts[number] for number in numbers], paired)
                examples |= dict(zip(numbers, found, strict=True))
        return [examples[number] for number in range(len(parts))]

    def _tokenized(self, parts: Sequence[Labelled], paired: bool, **options: Any) -> Iterable[LabelledIds]:
        encoded = self.writer(
            [part.first for part in parts],
            [part.second for part in parts] if paired else None,
            return_attention_mask=False,
            return_token_type_ids=self._with_types,
            verbose=False,
            **options,
        )
        types = encoded["token_type_ids"] if self._with_types else [[]] * len(parts)
        for part, ids, of_tokens in zip(parts, encoded["input_ids"], types, strict=True):
            yield LabelledIds(ids, of_tokens, str(part.label))

    def _fit(self, part: Labelled, example: LabelledIds, place: str) -> tuple[LabelledIds | None, Status, str]:
        """Truncation takes from the end of the longer sentence, token by token."""
        most = self.rules.max_length
        if len(example.ids) <= most:
            return example, Status.KEPT, ""
        note = self._too_long(len(example.ids), place)
        if self.rules.overlong == "drop":
            return None, Status.OVERLONG, note
        options = {"truncation": "longest_first", "max_length": most}
        (shorter,) = self._tokenized([part], part.second is not None, **options)
        return replace(shorter, num_removed=len(example.ids) - len(shorter.ids)), Status.KEPT, ""

    def _content(self, example: LabelledIds | None) -> dict[str, Any]:
        example = example or LabelledIds([], [], "")
        return {
            "input_ids": example.ids,
            "token_type_ids": example.types,
            "label": example.label,
            "removed": example.num_removed,
        }

    def _hashed(self, content: Mapping[str, Any]) -> bytes:
        ids, types = content["input_ids"], content["token_type_ids"]
        label: str = content["label"]
        return np.array([len(ids), *ids, *types], dtype=np.int64).tobytes() + label.encode()


def class_label(label: str | int | float) -> str:
    """The name of a class: text without white space around it, or a whole number.

    Raises:
        RowFlaw: the label is none.
    """
    if isinstance(label, float):
        raise RowFlaw(
            "label",
            f"must name a class, by text or a whole number, got {label}; for numbers set data.labels to regression",
        )
    name = str(label).strip()
    if not name:
        raise RowFlaw("label", "is empty, so that there is nothing to learn from it")
    return name


def number_label(label: str | int | float) -> float:
    """The number that a label is, or says.

    Raises:
        RowFlaw: the label is none, or not finite.
    """
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowFlaw("label", f"must be a number, got {shortened(label)}; for classes set data.labels to classes")
    return number


def class_names(labels: Iterable[str]) -> list[str]:
    """Each label once, in a fixed order: by value where all are whole numbers, otherwise by their letters."""
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
