"""Planted ranks: how many rank-one updates each layer of the teacher has. Plain numbers."""

import random
from collections.abc import Sequence

PATTERNS = {
    "varied": "every rank from 0 to twice the target, in pairs that sum to it",
    "half": "half of the layers need nothing, the others twice the target",
    "one-kind": "one kind of projection has the whole budget, all others need nothing",
    "uniform": "the target everywhere: what uniform LoRA assumes",
}
DEFAULT_KIND = "down_proj"


def planted_ranks(
    pattern: str, names: Sequence[str], target_rank: int, seed: int, kind: str = DEFAULT_KIND
) -> dict[str, int]:
    """Ranks by layer whose sum is exactly ``target_rank`` x layers, so the truth fits the student's budget.

    Args:
        pattern: one of :data:`PATTERNS`.
        names: full names of the layers.
        target_rank: components per layer, on average.
        seed: decides which layer gets which rank.
        kind: last part of the layer names in which ``one-kind`` plants.

    Raises:
        ValueError: there is no such pattern or kind.
    """
    names = sorted(names)
    if pattern == "one-kind":
        return _one_kind(names, target_rank, kind)
    if pattern not in PATTERNS:
        raise ValueError(f"--patterns has {pattern!r}, but must be of {', '.join(PATTERNS)}")
    chance = random.Random(f"{seed}/{pattern}")
    pairs = len(names) // 2
    lower = {
        # In the first pair, one layer needs nothing, whatever is drawn.
        "varied": [0, *(chance.randint(0, target_rank) for _ in range(pairs - 1))][:pairs],
        "half": [0] * pairs,
        "uniform": [target_rank] * pairs,
    }[pattern]
    ranks = [*lower, *(2 * target_rank - rank for rank in lower), *[target_rank] * (len(names) % 2)]
    chance.shuffle(ranks)
    return dict(zip(names, ranks, strict=True))


def _one_kind(names: Sequence[str], target_rank: int, kind: str) -> dict[str, int]:
    chosen = [name for name in names if name.rsplit(".", 1)[-1] == kind]
    if not chosen:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(f"--kind is {kind!r}, but must be one of the base's: {', '.join(kinds)}")
    each, left = divmod(target_rank * len(names), len(chosen))
    return {name: each + (chosen.index(name) < left) if name in chosen else 0 for name in names}
