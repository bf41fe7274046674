"""Finds the prompts in a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_dist.data.encoding.encoder import IGNORED


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, and the tokens that belong to them.

    Attributes:
        of_token: number of the prompt whose decision applies to each token; int64, shape ``(rows, length)``.
        pooled: indices, in the flattened batch, of all prompts' tokens; int64, shape ``(tokens,)``. A router reads only
            these.
        trained: whether each prompt has a trained answer (the others are padding of packed rows); boolean, shape
            ``(prompts,)``.
    """

    of_token: Tensor
    pooled: Tensor
    trained: Tensor

    @property
    def owners(self) -> Tensor:
        """Number of each pooled token's prompt; int64, shape ``(tokens,)``."""
        return self.of_token.flatten()[self.pooled]


def find_prompts(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> Prompts:
    """The prompts of a batch: in every row, or every example of a packed row, all tokens before the first target.
    Without labels, a prompt is all of its tokens. The first token is never a target, because nothing predicts it.

    Args:
        shape: shape of the batch, ``(rows, length)``.
        device: device of the batch.
        attention_mask: mask that is 0 at padding on either side, shape ``(rows, length)``. With a mask, a row holds one
            example.
        position_ids: positions, shape ``(rows or 1, length)``. Without a mask, an example begins wherever they restart.
        labels: labels, shape ``(rows, length)``; ``IGNORED`` at tokens that are not trained.

    Raises:
        ValueError: the mask has another shape and does not show the padding.
    """
    real = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask is not None or position_ids is None:
        if attention_mask is not None:
            if attention_mask.shape != shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, but must have shape "
                    f"{tuple(shape)} (rows, tokens) to show where prompts begin: give the padding mask"
                )
            real = attention_mask.to(device).bool()
        starts = real & (real.cumsum(1) == 1)
        of_token = torch.arange(shape[0], device=device)[:, None].expand(shape)
    else:
        starts = torch.ones_like(real)
        positions = position_ids.to(device).expand(shape)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        of_token = (starts.flatten().cumsum(0) - 1).view(shape)
    targets = torch.zeros_like(real) if labels is None else (labels.to(device) != IGNORED) & ~starts
    so_far = targets.flatten().cumsum(0)
    before = so_far[starts.flatten()]
    pooled = real.flatten() & (so_far == before[of_token.flatten()])
    trained = torch.zeros_like(before).index_add(0, of_token.flatten(), targets.flatten().to(before.dtype)) > 0
    return Prompts(of_token, pooled.nonzero().squeeze(1), trained)
