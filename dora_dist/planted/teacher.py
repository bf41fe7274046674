"""The base, the teacher planted in it, and the text for both."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dora_dist.base_model.copies import share
from dora_dist.base_model.shape import linear_layer

RANDOM_SIZES: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
HEAD_FACTOR = 2.0
"""Gives logits a standard deviation of 2: the next token is neither certain nor purely random."""
SAMPLED_AT_ONCE = 512


def load_base(path: Path | None, seed: int) -> PreTrainedModel:
    """A frozen causal language model in float32: from a folder, or a small LLaMA with random weights."""
    if path is None:
        small = LlamaForCausalLM(LlamaConfig(**RANDOM_SIZES, tie_word_embeddings=False))
        _randomize(small, seed)
        base: PreTrainedModel = small
    else:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base.config.use_cache = False
    base.requires_grad_(False)
    base.eval()
    return base


@torch.no_grad()
def _randomize(base: LlamaForCausalLM, seed: int) -> None:
    """Set weights that make every layer matter: each preserves the variance of its input. With transformers' own
    initialization, so narrow a model predicts almost nothing, and updates of late layers do not show in its output."""
    generator = torch.Generator().manual_seed(seed)
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5, generator=generator)
    base.model.embed_tokens.weight.normal_(0, 1, generator=generator)
    base.lm_head.weight.mul_(HEAD_FACTOR)


def plant(
    base: PreTrainedModel, ranks: Mapping[str, int], strength: float, decay: bool, seed: int
) -> tuple[PreTrainedModel, dict[str, float]]:
    """A teacher: the base plus, in every layer, an update of exactly the given rank in random orthogonal directions.

    Args:
        base: the base; not changed.
        ranks: planted ranks by full name of the linear layer.
        strength: Frobenius norm of a component relative to its layer's weight.
        decay: whether singular values of a layer fall as 1, 1/2, 1/3, ... at the same norm of the whole update;
            otherwise they are equal.
        seed: seed of the directions.

    Returns:
        The teacher (layers with rank 0 share the base's weights), and for each layer the norm of its update relative to
        its weight.

    Raises:
        ValueError: a rank is too high for its layer.
    """
    teacher = share(base)
    norms = {}
    for name, rank in ranks.items():
        layer = linear_layer(teacher, name)
        norms[name] = 0.0
        if rank:
            update = strength * layer.weight.norm() * _update(layer, name, rank, decay, seed)
            norms[name] = float(update.norm() / layer.weight.norm())
            layer.weight = nn.Parameter(layer.weight + update, requires_grad=False)
    return teacher, norms


def _update(layer: nn.Linear, name: str, rank: int, decay: bool, seed: int) -> Tensor:
    """The update of one layer, shape ``(out, in)``, Frobenius norm sqrt(rank)."""
    smaller = min(layer.weight.shape)
    if rank > smaller:
        raise ValueError(
            f"planted rank {rank} does not fit into {name}, {tuple(layer.weight.shape)}: lower --target-rank"
        )
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
        for size in layer.weight.shape
    )
    values = 1 / torch.arange(1, rank + 1, dtype=torch.float64) if decay else torch.ones(rank, dtype=torch.float64)
    values *= math.sqrt(rank) / values.norm()
    update: Tensor = left * values @ right.T
    return update.to(layer.weight.dtype)


@torch.no_grad()
def sample_rows(base: PreTrainedModel, count: int, length: int, seed: int) -> Tensor:
    """Texts sampled from the base at temperature 1, shape ``(count, length)``, int64. They begin with its bos token, or
    with a random token if it has none."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, bos = base.config.vocab_size, base.config.bos_token_id
    first = torch.randint(vocabulary, (count, 1), generator=generator)
    rows = first if bos is None else torch.full_like(first, bos)
    return torch.cat([_continue(base, part, length, generator) for part in rows.split(SAMPLED_AT_ONCE)])


def _continue(base: PreTrainedModel, rows: Tensor, length: int, generator: torch.Generator) -> Tensor:
    cache = None
    while rows.shape[1] < length:
        outputs = base(input_ids=rows[:, -1:], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        probabilities = outputs.logits[:, -1].softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return rows
