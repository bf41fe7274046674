"""The order of training examples from one or several sources: a function of sizes, shares and seed only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dora_dist.data.plan import PackedOrder, TrainingPlan, plan_by_length, plan_padded


def pass_counts(
    sizes: Sequence[int],
    weights: Sequence[float] | None = None,
    epochs: Sequence[float] | None = None,
    temperature: float | None = None,
) -> list[int]:
    """Examples of each source in one pass over the mixture.

    Without any of the options, every example comes once. At most one of them may be given.

    Args:
        sizes: examples of each source, at least 1.
        weights: share of each source in a pass of ``sum(sizes)`` examples, up to a common factor.
        epochs: number of times that the examples of each source come in one pass.
        temperature: shares in proportion to ``size ** (1 / temperature)``, in a pass of ``sum(sizes)`` examples: 1 is
            in proportion to the sizes, and the larger it is, the more alike are the shares (Raffel et al. 2020, section
            3.5.2; Xue et al. 2021, mT5, with ``alpha = 1 / temperature``).
    """
    if epochs is not None:
        return [max(1, round(size * times)) for size, times in zip(sizes, epochs, strict=True)]
    if temperature is not None:
        weights = [size ** (1 / temperature) for size in sizes]
    if weights is None:
        return list(sizes)
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    exact = shares * sum(sizes)
    counts = np.floor(exact).astype(np.int64)
    # The largest remainders get what is left, the first of equal ones first; no source is left out altogether.
    left = sum(sizes) - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:left]] += 1
    return [max(1, int(count)) for count in counts]


def cap_examples(size: int, most: int | None, seed: int, source: int) -> np.ndarray:
    """Which examples of a source take part: all, or a random choice of ``most``, in ascending order.

    Returns:
        Their indices in the source, int64, shape (min(size, most),).
    """
    if most is None or most >= size:
        return np.arange(size)
    return np.sort(_generator(seed, 1, source).permutation(size)[:most])


def hold_back(members: Sequence[np.ndarray], count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Take a random choice of examples out of the sources, in proportion to their sizes on average.

    Args:
        members: one int64 array per source: the indices of its examples in the whole data.
        count: number of examples that are taken out.
        seed: the run's seed.

    Returns:
        What is left of each source, and what was taken out, both in ascending order.

    Raises:
        ValueError: no example of a source would be left.
    """
    everything = np.concatenate(members)
    chosen = np.sort(_generator(seed, 6).permutation(everything)[:count])
    left = [indices[~np.isin(indices, chosen)] for indices in members]
    if any(len(indices) == 0 for indices in left):
        raise ValueError(
            f"pruning.scoring_rows is {count}, which leaves no example of a source to train on, of "
            f"{', '.join(str(len(indices)) for indices in members)} examples in the sources: lower it, or leave small "
            "sources out of data.train"
        )
    return left, chosen


def example_order(members: Sequence[np.ndarray], counts: Sequence[int], length: int, seed: int) -> np.ndarray:
    """The first examples of a training run, pass after pass without an end.

    Every source goes through its own examples in a new permutation each time round, and goes on where it stopped in
    the pass before. In each pass the sources are mixed evenly: which comes when is one permutation of the pass.

    Args:
        members: one int64 array per source: the indices of its examples in the whole data.
        counts: result of :func:`pass_counts`.
        length: number of examples that are wanted.
        seed: the run's seed, for all permutations.

    Returns:
        Indices in the whole data, int64, shape (length,). A longer order begins with every shorter one.
    """
    per_pass = sum(counts)
    num_passes = -(-length // per_pass)
    order = np.empty(num_passes * per_pass, dtype=np.int64)
    streams = [
        _stream(indices, count * num_passes, seed, source)
        for source, (indices, count) in enumerate(zip(members, counts, strict=True))
    ]
    labels = np.repeat(np.arange(len(counts)), counts)
    for number in range(num_passes):
        mixed = _generator(seed, 2, number).permutation(labels)
        part = order[number * per_pass : (number + 1) * per_pass]
        for source, count in enumerate(counts):
            part[mixed == source] = streams[source][number * count : (number + 1) * count]
    return order[:length]


def _stream(indices: np.ndarray, length: int, seed: int, source: int) -> np.ndarray:
    rounds = -(-length // len(indices))
    parts = [indices[_generator(seed, 3, source, number).permutation(len(indices))] for number in range(rounds)]
    return np.concatenate(parts)[:length]


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The endless order of training examples, and how they are put into rows.

    Attributes:
        members: one int64 array per source: the indices, in the whole data, of its examples that take part.
        counts: examples of each source in a pass.
        lengths: tokens of every example of all sources.
        batching: ``padded``, ``packed`` or ``by_length``.
        max_length: tokens of a packed row.
        seed: the run's seed.
        held_back: indices of the examples that no row of the run has; int64.
    """

    members: list[np.ndarray]
    counts: list[int]
    lengths: np.ndarray
    batching: str
    max_length: int
    seed: int
    held_back: np.ndarray = field(default_factory=lambda: np.arange(0))

    def order(self, length: int) -> np.ndarray:
        """Indices of the first ``length`` examples, int64."""
        return example_order(self.members, self.counts, length, self.seed)

    @cached_property
    def _packed(self) -> PackedOrder:
        return PackedOrder(self.order, sum(self.counts), self.lengths, self.max_length, self.seed)

    @property
    def rows_per_epoch(self) -> int:
        """Rows that one pass over the mixture fills."""
        return self.rows_of_epochs(1)

    def rows_of_epochs(self, epochs: float) -> int:
        """Rows that so many passes over the mixture fill."""
        length = max(1, round(epochs * sum(self.counts)))
        if self.batching == "packed":
            return self._packed.num_rows(length)
        return length

    def plan(self, num_steps: int, global_batch: int) -> TrainingPlan:
        """The rows of a run of ``num_steps`` optimizer steps of ``global_batch`` rows."""
        num_rows = num_steps * global_batch
        if self.batching == "packed":
            return self._packed.plan(num_rows)
        if self.batching == "by_length":
            return plan_by_length(self.order(num_rows), self.lengths, global_batch, self.seed)
        return plan_padded(self.order(num_rows))
