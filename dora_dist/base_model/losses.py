"""Losses of tasks other than causal language modelling, computed from the logits and not by the model class.

Left to transformers (5.23), they would be wrong: the Trainer assumes that a model that accepts ``**kwargs`` divides its
loss by ``num_items_in_batch``. It then does not divide by the accumulation steps, and multiplies by the number of
ranks, but these models' losses are means over the micro-batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

RowLosses = Callable[[Any, Mapping[str, Tensor]], Tensor]
"""Maps a model's output and the batch with its ``labels`` to the loss of every row, ``(rows,)``, at least float32."""


def class_losses(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of ``outputs.logits`` ``(rows, classes)`` with ``labels`` ``(rows,)``, int64."""
    return functional.cross_entropy(_precise(outputs.logits), batch["labels"], reduction="none")


def squared_errors(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Squared differences of ``outputs.logits`` ``(rows, 1)`` from the numbers ``labels`` ``(rows,)``."""
    return (_precise(outputs.logits).squeeze(1) - batch["labels"]).square()


def span_losses(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of the cross-entropies of ``outputs.start_logits`` and ``end_logits`` ``(rows, length)`` with the positions
    ``labels`` ``(rows, 2)``. Padding is masked: otherwise the loss of a row would depend on the other rows in its
    micro-batch."""
    padding = batch["attention_mask"] == 0
    start, end = (
        functional.cross_entropy(
            _precise(logits).masked_fill(padding, -torch.inf), batch["labels"][:, number], reduction="none"
        )
        for number, logits in enumerate((outputs.start_logits, outputs.end_logits))
    )
    return (start + end) / 2


def token_losses(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of ``outputs.logits`` ``(rows, length, vocabulary)`` with ``labels``, which are not shifted; shape
    ``(rows, length)``, 0 where a label is ignored."""
    return functional.cross_entropy(_precise(outputs.logits).transpose(1, 2), labels, reduction="none")


def mean_over_tokens(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Sum of the :func:`token_losses` divided by the number of labels in the global batch, as the Trainer wants it."""
    return token_losses(outputs, labels).sum() / num_items_in_batch


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
