"""From a plan to the tensors of a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils import data
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from dora_dist.data.encoding.encoder import IGNORED
from dora_dist.data.encoding.text import labels_of
from dora_dist.data.plan import TrainingPlan

Example = dict[str, Any]
Collator = Callable[[Sequence[list[Example]]], dict[str, Any]]


def as_example(row: Mapping[str, Any]) -> Example:
    """``input_ids`` and ``labels`` of a stored row."""
    return {"input_ids": row["input_ids"], "labels": labels_of(row["input_ids"], row["spans"])}


@dataclass(frozen=True)
class Reader:
    """How a stored row becomes an example.

    Attributes:
        columns: names of the columns that the row needs.
        read: makes of the row the example that a collator takes.
    """

    columns: Sequence[str]
    read: Callable[[Mapping[str, Any]], Example]


TRAINED_TOKENS = Reader(("input_ids", "spans"), as_example)


def labelled(labels: Sequence[str] | None) -> Reader:
    """Reader of rows of :class:`~dora_dist.data.encoding.classification.LabelledEncoder`.

    Args:
        labels: names of the classes in the order of their numbers; None where labels are numbers themselves.
    """
    numbers = None if labels is None else {name: number for number, name in enumerate(labels)}

    def read(row: Mapping[str, Any]) -> Example:
        label = float(row["label"]) if numbers is None else numbers[row["label"]]
        return {"input_ids": row["input_ids"], "token_type_ids": row["token_type_ids"], "labels": label}

    return Reader(("input_ids", "token_type_ids", "label"), read)


def _answer_span(row: Mapping[str, Any]) -> Example:
    return {
        "input_ids": row["input_ids"],
        "token_type_ids": row["token_type_ids"],
        "labels": [row["start"], row["end"]],
    }


ANSWER_SPANS = Reader(("input_ids", "token_type_ids", "start", "end"), _answer_span)
"""Reader of rows of :class:`~dora_dist.data.encoding.questions.QuestionEncoder`: the labels are the answer's first and
last token."""

TARGETS = Reader(("input_ids", "labels"), dict)
"""Reader of rows of :class:`~dora_dist.data.encoding.summaries.SummaryEncoder`."""


class PlannedRows(data.Dataset[list[Example]]):
    """The rows of a plan, by number; every row is the list of its examples.

    Args:
        examples: the stored rows, with the columns of ``reader``.
        plan: the run's plan.
        reader: makes an example of a stored row.
    """

    def __init__(self, examples: Dataset, plan: TrainingPlan, reader: Reader = TRAINED_TOKENS) -> None:
        self.examples = examples.select_columns(list(reader.columns))
        self.plan = plan
        self.reader = reader

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, number: int) -> list[Example]:
        return [self.reader.read(self.examples[int(index)]) for index in self.plan.row(number)]


class PaddedCollator:
    """One example a row, padded on the right to the longest.

    Args:
        tokenizer: the model's, with a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, int64, shape (rows, longest)."""
        examples = [example for (example,) in rows]
        return dict(self._pad([{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]))


class PredictingCollator:
    """Batches of another collator, with the positions that have a target, found while the labels are on the CPU.

    Args:
        collator: makes batches with ``labels`` for each token.
    """

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, Any]:
        """The other collator's batch, and ``predicting`` (see the function of this name)."""
        batch = self._collator(rows)
        return {**batch, "predicting": predicting(batch["labels"])}


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Positions in the flattened batch whose next token is a label, int64, shape ``(targets,)``.

    Args:
        labels: int64, shape (rows, length), ``IGNORED`` where there is none.
    """
    shifted = pad(labels[:, 1:], (0, 1), value=IGNORED)
    return (shifted.flatten() != IGNORED).nonzero().squeeze(1)


class LabelledCollator:
    """One example a row, padded on the right to the longest, with a label, or two, for the row as a whole.

    Args:
        tokenizer: the model's, with a padding token.
        with_types: whether the model is told which sentence a token belongs to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, with_types: bool) -> None:
        self._fillings = {"input_ids": tokenizer.pad_token_id}
        if with_types:
            self._fillings["token_type_ids"] = tokenizer.pad_token_type_id

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, perhaps ``token_type_ids``, int64, shape (rows, longest), and ``labels``:
        shape (rows,), int64 for classes and float32 for numbers; of spans (rows, 2), int64."""
        examples = [example for (example,) in rows]
        batch = {name: _padded(examples, name, filling) for name, filling in self._fillings.items()}
        batch["attention_mask"] = _mask(examples)
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch


class TargetCollator:
    """One example a row for a model with an encoder and a decoder, both sides padded on the right to their longest.

    Args:
        tokenizer: the model's, with a padding token.
        decoder_inputs: the model's own function that shifts labels to what the decoder reads in order to write them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, decoder_inputs: Callable[[torch.Tensor], torch.Tensor]):
        self._pad_id = tokenizer.pad_token_id
        self._decoder_inputs = decoder_inputs

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask``, shape (rows, longest document); ``labels`` and ``decoder_input_ids``,
        shape (rows, longest summary). All int64."""
        examples = [example for (example,) in rows]
        labels = _padded(examples, "labels", IGNORED)
        return {
            "input_ids": _padded(examples, "input_ids", self._pad_id),
            "attention_mask": _mask(examples),
            "decoder_input_ids": self._decoder_inputs(labels),
            "labels": labels,
        }


def _padded(examples: Sequence[Example], name: str, filling: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(example[name]) for example in examples], True, filling)


def _mask(examples: Sequence[Example]) -> torch.Tensor:
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


class PackedCollator:
    """Several examples a row, which do not see each other: positions start anew with every example, and where there is
    no attention mask, transformers makes a block-diagonal one of these positions.

    Args:
        tokenizer: the model's, with a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._flatten = DataCollatorWithFlattening(return_position_ids=True, separator_id=IGNORED)
        self._pad_id = tokenizer.pad_token_id

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``labels`` and ``position_ids``, int64, shape (rows, longest). Padding at the end of a row is
        an example of its own without labels."""
        flat = [self._flatten(row) for row in rows]
        longest = max(row["input_ids"].shape[1] for row in flat)
        columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in flat:
            missing = longest - row["input_ids"].shape[1]
            fillings = {
                "input_ids": torch.full((missing,), self._pad_id),
                "labels": torch.full((missing,), IGNORED),
                "position_ids": torch.arange(missing),
            }
            for name, filling in fillings.items():
                columns[name].append(torch.cat([row[name][0], filling]))
        return {name: torch.stack(tensors) for name, tensors in columns.items()}


class FlattenedCollator:
    """All examples of all rows in one long row, for kernels that take the lengths of sequences (FlashAttention)."""

    def __init__(self) -> None:
        self._flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, separator_id=IGNORED)

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, Any]:
        """transformers' padding-free batch: ``input_ids``, ``labels``, ``position_ids`` of shape (1, tokens), and the
        sequences' bounds."""
        return dict(self._flatten([example for row in rows for example in row]))
