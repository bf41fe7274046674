"""The router of a decoder block: maps a prompt's hidden states to the modules that are adapted for it.

MiLoRA (Zhang et al., Findings of EMNLP 2024), equations 3 to 5 and 8, with GELU instead of the learned activation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dora_dist.adapter.layer import layer_generator
from dora_dist.routing.prompts import Prompts


class Router(nn.Module):
    """``softmax(W_r gelu(h))``, where ``h`` is the mean of the prompt's hidden states H, weighted by an attention over
    its tokens: ``softmax(w_sa . H)``.

    Parameters (adapter dtype): ``pooler``, the paper's ``w_sa``, shape ``(hidden,)``; ``weight``, its ``W_r``, shape
    ``(modules, hidden)``. All computation is in float32 at least, whatever autocast says, because rounding would change
    choices.

    Args:
        hidden_size: size of the hidden states.
        num_modules: number of adapted modules in a block.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(self, hidden_size: int, num_modules: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.pooler = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_modules, hidden_size, device=device, dtype=dtype))

    @torch.no_grad()
    def initialize(self, seed: int, name: str) -> None:
        """Start with the plain mean over a prompt, and with weights as in a linear layer: zeros would choose the same
        modules for every prompt. The values depend only on ``seed`` and ``name``."""
        weight = torch.empty(self.weight.shape)
        nn.init.kaiming_uniform_(weight, a=5**0.5, generator=layer_generator(seed, name))
        self.weight.copy_(weight)
        self.pooler.zero_()

    def forward(self, hidden: Tensor, prompts: Prompts) -> Tensor:
        """Probabilities of the modules.

        Args:
            hidden: the block's input, shape ``(rows, length, hidden)``.
            prompts: prompts of the batch.

        Returns:
            Shape ``(prompts, modules)``, float32 or float64; every row sums to 1.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.flatten(0, 1)[prompts.pooled].to(dtype)
            own = prompts.owners == torch.arange(len(prompts.trained), device=hidden.device)[:, None]
            scores = torch.where(own, states @ self.pooler.to(dtype), -torch.inf)
            pooled = scores.softmax(1) @ states
            logits: Tensor = functional.gelu(pooled) @ self.weight.to(dtype).T
            return logits.softmax(1)


@dataclass(frozen=True)
class Decision:
    """A router's decision for the prompts of a batch.

    Attributes:
        probabilities: probability of each module, shape ``(prompts, modules)``.
        chosen: whether a module is among the k most probable of its row; boolean, shape ``(prompts, modules)``.
        gates: factors of the chosen modules' outputs, 0 for the others; shape ``(prompts, modules)``.
    """

    probabilities: Tensor
    chosen: Tensor
    gates: Tensor


def decide(probabilities: Tensor, count: int, chosen: Tensor | None = None) -> Decision:
    """Choose the most probable modules. Their gates are the probabilities, renormalized over the chosen modules, times
    the number of chosen modules: 1 if they are equal, as in plain LoRA.

    Args:
        probabilities: probability of each module, shape ``(prompts, modules)``.
        count: number of modules to choose.
        chosen: the earlier choice (:attr:`Decision.chosen`), if a forward is recomputed.
    """
    if chosen is None:
        best = probabilities.detach().topk(count, dim=1).indices
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, best, True)
    kept = probabilities * chosen
    return Decision(probabilities, chosen, kept * count / kept.sum(1, keepdim=True))


def balance_loss(
    probabilities: Sequence[Tensor], trained: Tensor, add_up: Callable[[Tensor], None], ranks: int
) -> Tensor:
    """``N sum_i f_i p_i``, mean over the blocks; 1 if all N modules are equally probable. ``f_i`` is the share of
    prompts for which module i is the most probable, and ``p_i`` its mean probability (equation 4).

    Both are taken over the prompts of all ranks, which are the global batch without gradient accumulation. No gradient
    flows through ``f``. The gradient through ``p`` comes from this rank's prompts, multiplied by the number of ranks,
    because engines take the mean of gradients over the ranks.

    Args:
        probabilities: one tensor of probabilities for each block, shape ``(prompts, modules)``.
        trained: the prompts that count; boolean, shape ``(prompts,)``.
        add_up: function that replaces a tensor by its sum over the ranks; called once.
        ranks: number of ranks.

    Returns:
        Scalar, float64, the same on every rank.
    """
    mine = torch.stack([of_block[trained] for of_block in probabilities]).double()
    modules = mine.shape[2]
    first = functional.one_hot(mine.argmax(2), modules).sum(1)
    sums = mine.sum(1)
    flat = torch.cat([first.flatten().double(), sums.detach().flatten(), mine.new_tensor([mine.shape[1]])])
    add_up(flat)
    counts, all_sums = flat[:-1].view(2, *sums.shape)
    total = flat[-1].clamp(min=1)  # it is 0 if no rank has a prompt with an answer
    factor = modules / len(mine) * counts / total**2
    local: Tensor = (factor * sums).sum() * ranks
    everywhere: Tensor = (factor * all_sums).sum()
    return local + (everywhere - local).detach()
