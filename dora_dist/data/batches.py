"""From a plan to the tensors of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils import data
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from dora_dist.data.encode import IGNORED, labels_of
from dora_dist.data.plan import TrainingPlan

Example = dict[str, list[int]]
Collator = Callable[[Sequence[list[Example]]], dict[str, Any]]


def as_example(row: Mapping[str, Any]) -> Example:
    """``input_ids`` and ``labels`` of a stored row."""
    return {"input_ids": row["input_ids"], "labels": labels_of(row["input_ids"], row["spans"])}


class PlannedRows(data.Dataset[list[Example]]):
    """The rows of a plan, by number; every row is the list of its examples.

    Args:
        examples: with columns ``input_ids`` and ``spans``.
        plan: of the run.
    """

    def __init__(self, examples: Dataset, plan: TrainingPlan) -> None:
        self.examples = examples.select_columns(["input_ids", "spans"])
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, number: int) -> list[Example]:
        return [as_example(self.examples[int(index)]) for index in self.plan.row(number)]


class PaddedCollator:
    """One example a row, padded on the right to the longest.

    Args:
        tokenizer: with a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def __call__(self, rows: Sequence[list[Example]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, int64, shape (rows, longest)."""
        examples = [example for (example,) in rows]
        return dict(self._pad([{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]))


class PackedCollator:
    """Several examples a row, which do not see each other: positions start anew with every example, and there is no
    attention mask, from which transformers makes a block-diagonal mask.

    Args:
        tokenizer: with a padding token.
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
