"""Held-out loss and metrics of sequence classification and regression, the same numbers on any number of ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.losses import RowLosses
from dora_dist.data.batches import LabelledCollator, Reader
from dora_dist.evaluation.evaluator import Evaluator
from dora_dist.evaluation.metrics import CLASS_METRICS, NUMBER_METRICS

Outcome = tuple[int, float, int | float, int | float]
"""Outcome of one example: its index, its loss, the prediction (the number of a class, or a number), and its label."""


@dataclass(frozen=True, kw_only=True)
class LabelEvaluator(Evaluator):
    """Measures a model with one output for every class, or with one output for regression.

    Args:
        reader: makes an example of a stored row.
        collate: makes the batches.
        row_losses: the task's losses of the rows of a batch.
        metrics: names of :data:`~dora_dist.evaluation.metrics.CLASS_METRICS`, or of ``NUMBER_METRICS`` for regression.
        regression: whether labels are numbers.
    """

    reader: Reader
    collate: LabelledCollator
    row_losses: RowLosses
    metrics: Sequence[str]
    regression: bool

    def measure(self, model: DynamicLoraModel, examples: Dataset, share: list[range], progress: tqdm) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for indices in share:
            rows: list[Mapping[str, Any]] = [examples[index] for index in indices]
            batch = {k: v.to(model.device) for k, v in self.collate([[self.reader.read(row)] for row in rows]).items()}
            labels = batch["labels"]
            outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            losses = self.row_losses(outputs, batch).double()
            predicted = outputs.logits.squeeze(1) if self.regression else outputs.logits.argmax(1)
            outcomes += zip(indices, losses.tolist(), predicted.tolist(), labels.tolist(), strict=True)
            progress.update(len(indices))
        return outcomes

    def figures(self, part: list[Outcome]) -> dict[str, float]:
        losses = [loss for _, loss, _, _ in part]
        predicted, labels = ([outcome[place] for outcome in part] for place in (2, 3))
        measures: Mapping[str, Any] = NUMBER_METRICS if self.regression else CLASS_METRICS
        figures = {name: measures[name](predicted, labels) for name in self.metrics}
        return {"loss": math.fsum(losses) / len(losses), "examples": len(part), **figures}
