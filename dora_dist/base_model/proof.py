"""Rows and a distance for trials that prove, on the model itself, that something may replace the model's own code."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dora_dist.base_model.shape import input_embedding


def short_rows(model: PreTrainedModel) -> Tensor:
    """Token ids of two short rows, shape ``(2, 8)``, on the model's device, without drawing random numbers."""
    embedding = input_embedding(model).weight
    numbers = torch.arange(16, device=embedding.device)
    return (7 * numbers + 3).remainder(embedding.shape[0]).view(2, 8)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, divided by the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
