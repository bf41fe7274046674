"""Texts with their summaries: examples for a model that has an encoder and a decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value
from transformers import PreTrainedTokenizerBase

from dora_dist.data.encoding.encoder import IDS_ONLY, EncodingRules, RowEncoder, RowParser, Status
from dora_dist.data.reading.samples import Summary


@dataclass(frozen=True, slots=True)
class SummaryIds:
    """One example.

    Attributes:
        ids: token ids of the document, for the encoder.
        labels: token ids of the summary, as the tokenizer writes a target, with the token that ends it.
        answer: the whole summary as text, to compare a generated one with, also where ``labels`` were cut.
        num_removed: tokens that were cut off from document and summary to make them fit.
    """

    ids: list[int]
    labels: list[int]
    answer: str
    num_removed: int = 0


class SummaryEncoder(RowEncoder[Summary, SummaryIds]):
    """Documents and summaries, each within a length of its own.

    With ``overlong: truncate`` both lose their ends, as in the paper's code; the token that ends a summary stays.

    Raises:
        ValueError: a length leaves no room for text, or the tokenizer does not end a target with its end token, so that
            the model could not learn where to stop.
    """

    columns: ClassVar[dict[str, Any]] = {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "answer": Value("string"),
    }

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: EncodingRules, parse: RowParser) -> None:
        super().__init__(tokenizer, rules, parse)
        for rule in ("max_length", "max_target_length"):
            own = tokenizer.num_special_tokens_to_add(pair=False)
            if getattr(rules, rule) <= own:
                raise ValueError(
                    f"data.{rule} is {getattr(rules, rule)}, but the tokenizer alone puts {own} tokens around a text: "
                    "raise it"
                )
        (probe,) = self._targets(["a"])
        if tokenizer.eos_token_id is None or probe[-1:] != [tokenizer.eos_token_id]:
            raise ValueError(
                f"the tokenizer does not end a summary with an end token ({tokenizer.convert_ids_to_tokens(probe)}), "
                "so that the model could not learn where to stop: take a model with an encoder and a decoder"
            )

    def _texts(self, sample: Summary) -> list[tuple[str, str]]:
        return [("document", sample.document), ("summary", sample.summary)]

    def _parts(self, sample: Summary) -> list[Summary]:
        return [Summary(sample.document.strip(), sample.summary.strip())]

    def _encode(self, parts: Sequence[Summary]) -> list[SummaryIds]:
        if not parts:
            return []
        documents = self.writer([part.document for part in parts], **IDS_ONLY)["input_ids"]
        targets = self._targets([part.summary for part in parts])
        return [
            SummaryIds(ids, labels, part.summary) for part, ids, labels in zip(parts, documents, targets, strict=True)
        ]

    def _targets(self, summaries: Sequence[str], **options: Any) -> list[list[int]]:
        targets: list[list[int]] = self.writer(text_target=list(summaries), **IDS_ONLY, **options)["input_ids"]
        return targets

    def _fit(self, part: Summary, example: SummaryIds, place: str) -> tuple[SummaryIds | None, Status, str]:
        notes = [
            f"the {name} has {self._too_long(len(ids), f'{place}: the {name}', rule)}"
            for name, ids, rule in (
                ("document", example.ids, "max_length"),
                ("summary", example.labels, "max_target_length"),
            )
            if len(ids) > getattr(self.rules, rule)
        ]
        if not notes:
            return example, Status.KEPT, ""
        if self.rules.overlong == "drop":
            return None, Status.OVERLONG, "; ".join(notes)
        ids = self.writer(part.document, truncation=True, max_length=self.rules.max_length, **IDS_ONLY)["input_ids"]
        (labels,) = self._targets([part.summary], truncation=True, max_length=self.rules.max_target_length)
        removed = len(example.ids) - len(ids) + len(example.labels) - len(labels)
        return SummaryIds(ids, labels, example.answer, removed), Status.KEPT, ""

    def _content(self, example: SummaryIds | None) -> dict[str, Any]:
        example = example or SummaryIds([], [], "")
        return {
            "input_ids": example.ids,
            "labels": example.labels,
            "answer": example.answer,
            "removed": example.num_removed,
        }

    def _hashed(self, content: Mapping[str, Any]) -> bytes:
        ids, labels = content["input_ids"], content["labels"]
        return np.array([len(ids), *ids, *labels], dtype=np.int64).tobytes()
