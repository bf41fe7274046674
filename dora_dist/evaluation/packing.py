"""Proof that packed examples do not see each other."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dora_dist.base_model.shape import input_embedding
from dora_dist.data.batches import Collator

LEAST_SEPARATION = 0.05
"""Largest share of the effect of an example on another in one text that may be left where both are packed."""


@torch.no_grad()
def check_packing(model: PreTrainedModel, collate: Collator) -> None:
    """Prove on the model itself that examples of one row do not see each other.

    The second of two examples is computed alone, packed behind the first, and behind the first in one text; packing
    must leave next to nothing of the difference that the text before makes.

    Args:
        model: the causal language model, on its device.
        collate: makes the packed batch.

    Raises:
        ValueError: they do see each other, so that the model would learn from other examples' texts.
    """
    was_training = model.training
    model.eval()
    size = input_embedding(model).weight.shape[0]
    first, second = ([(7 * n + shift) % size for n in range(6)] for shift in (3, 5))

    def end(batch: Mapping[str, Tensor | int]) -> Tensor:
        moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        logits: Tensor = model(**moved).logits
        return logits[0, -len(second) :].float()

    def example(ids: list[int]) -> dict[str, list[int]]:
        return {"input_ids": ids, "labels": ids}

    alone = end(collate([[example(second)]]))
    packed = end(collate([[example(first), example(second)]]))
    together = end(collate([[example(first + second)]]))
    model.train(was_training)
    leak, whole = float((packed - alone).norm()), float((together - alone).norm())
    if leak > LEAST_SEPARATION * whole:
        raise ValueError(
            f"data.batching is packed, but in {type(model).__name__} with attention "
            f"{model.config._attn_implementation} the examples of a row see each other (their logits change by "
            f"{leak:.3g}, {leak / whole:.0%} of what one text would do): set data.batching to by_length"
        )
