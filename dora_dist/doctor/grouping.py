"""Groups ranks with the same finding, and names them."""

from collections.abc import Callable, Iterable, Sequence

from dora_dist.console.text import ranges
from dora_dist.doctor.facts import Problem, RankFacts

FEW_NODES = 4
"""Most nodes that are named; of the others, only the number is given."""


def alike(
    ranks: Sequence[RankFacts], found: Callable[[RankFacts], str | None], rule: str, action: str
) -> list[Problem]:
    """One problem for each finding, with all ranks that have it.

    Args:
        ranks: facts of all ranks.
        found: function that returns what is wrong with a rank, or None.
        rule: the requirement.
        action: advice.
    """
    groups: dict[str, list[RankFacts]] = {}
    for facts in ranks:
        text = found(facts)
        if text is not None:
            groups.setdefault(text, []).append(facts)
    return [Problem(place(group, ranks), text, rule, action) for text, group in groups.items()]


def by_node(ranks: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    """Node -> its ranks, in order."""
    nodes: dict[str, list[RankFacts]] = {}
    for facts in ranks:
        nodes.setdefault(facts.node, []).append(facts)
    return nodes


def listed(texts: Iterable[str]) -> str | None:
    """The distinct texts joined by commas; None if there is none."""
    return ", ".join(dict.fromkeys(texts)) or None


def place(some: Sequence[RankFacts], everyone: Sequence[RankFacts]) -> str:
    """Ranks named with their nodes: ``rank 1 on node02``, ``all 16 ranks``; a single process by its node."""
    if len(everyone) == 1:
        return everyone[0].node
    if len(some) == len(everyone):
        return f"all {len(everyone)} ranks"
    by_node: dict[str, list[int]] = {}
    for facts in some:
        by_node.setdefault(facts.node, []).append(facts.rank)
    named = [
        f"rank{'s' * (len(numbers) > 1)} {ranges(numbers)} on {node}"
        for node, numbers in list(by_node.items())[:FEW_NODES]
    ]
    more = len(by_node) - FEW_NODES
    return "; ".join(named) + (f"; and on {more} more node{'s' * (more > 1)}" if more > 0 else "")
