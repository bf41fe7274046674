"""Access to single training rows of a trainer, for a start from data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dora_dist.adapter.model import DynamicLoraForCausalLM, DynamicLoraModel


def check_numbered(dataloader: DataLoader[Any]) -> int:
    """The number of training rows.

    Raises:
        ValueError: the rows cannot be accessed by number.
    """
    if not hasattr(dataloader.dataset, "__len__") or not hasattr(dataloader.dataset, "__getitem__"):
        raise ValueError(
            f"init needs access to training rows by number, but the train_dataset is a "
            f"{type(dataloader.dataset).__name__}, which streams them: load it as a whole, or omit init"
        )
    return len(dataloader.dataset)


def loss_of_row(model: DynamicLoraModel, dataloader: DataLoader[Any], number: int) -> Tensor:
    """The model's own loss of a training row, a scalar; for a language model the sum over the row's targets."""
    assert dataloader.collate_fn is not None
    batch = without_padding(dataloader.collate_fn([dataloader.dataset[number]]))
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if isinstance(model, DynamicLoraForCausalLM):
        inputs["num_items_in_batch"] = torch.ones((), device=model.device)
    loss: Tensor = model(**inputs).loss
    return loss


def without_padding(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of one row without the tokens that its ``attention_mask``, shape ``(1, tokens)``, masks."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor):
        return dict(batch)
    kept = mask[0].bool()
    return {
        name: value[:, kept] if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in batch.items()
    }
