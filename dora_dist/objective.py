"""Losses of tasks with one target a row: by row, from the logits, whatever the model class would make of them.

Left to transformers (5.23), their loss would be wrong: the Trainer takes a model that accepts ``**kwargs`` for one that
divides by ``num_items_in_batch``, and so neither divides by the accumulation steps nor leaves out the factor of the
number of ranks, while these models' losses are means over the micro-batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

RowLosses = Callable[[Any, Tensor], Tensor]
"""From a model's output and the batch's ``labels`` to the loss of every row, shape ``(rows,)``, at least float32."""


def class_losses(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of ``outputs.logits`` ``(rows, classes)`` with ``labels`` ``(rows,)``, int64."""
    return functional.cross_entropy(_precise(outputs.logits), labels, reduction="none")


def squared_errors(outputs: Any, labels: Tensor) -> Tensor:
    """Of ``outputs.logits`` ``(rows, 1)`` from the numbers ``labels`` ``(rows,)``."""
    return (_precise(outputs.logits).squeeze(1) - labels).square()


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
