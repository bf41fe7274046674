"""Chooses the examples that a preview shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from dora_dist.data.mixture import Mixture
    from dora_dist.data.prepared import PreparedSource
    from dora_dist.setup.run_data import RunData

FEW = 3
"""Default number of examples, unless there are more sources."""


@dataclass(frozen=True, kw_only=True)
class ExampleSelection:
    """The user's choice of examples.

    Attributes:
        number: number of examples; None for a few, with at least one from every source.
        source: name of the only source to show; None for all.
        held_out: whether to show the held-out sources instead of the training sources.
        longest: whether to show the longest examples instead of the first ones.
        truncated: whether to show only truncated examples.
    """

    number: int | None = None
    source: str | None = None
    held_out: bool = False
    longest: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class Pool:
    """The chosen sources and their eligible examples.

    Attributes:
        sources: all sources of one part of the data, training or held-out; an example's index counts through all.
        chosen: numbers of the chosen sources.
        members: indices of the eligible examples, one array for each chosen source.
    """

    sources: "Sequence[PreparedSource]"
    chosen: Sequence[int]
    members: "Sequence[np.ndarray]"

    def first(self) -> "np.ndarray":
        """Index of each source's first example, and the total number of examples."""
        import numpy as np

        return np.cumsum([0, *(source.counts.examples for source in self.sources)])

    def column(self, of: Callable[["PreparedSource"], "np.ndarray"]) -> "np.ndarray":
        """One number for every example of all sources."""
        import numpy as np

        return np.concatenate([of(source) for source in self.sources])


def build_pool(data: "RunData", mixture: "Mixture", choice: ExampleSelection) -> Pool:
    """The chosen sources and their eligible examples.

    Raises:
        ValueError: there is no such source.
    """
    import numpy as np

    sources, key = (data.evaluation, "data.eval") if choice.held_out else (data.train, "data.train")
    if not sources:
        raise ValueError("--eval is given, but there is no held-out data: set data.eval")
    names = [source.name for source in sources]
    if choice.source is not None and choice.source not in names:
        raise ValueError(f"--source is {choice.source!r}, but {key} has {', '.join(names)}")
    chosen = [number for number, name in enumerate(names) if choice.source in (None, name)]
    ends = np.cumsum([source.counts.examples for source in sources])
    members = [np.arange(end - source.counts.examples, end) for end, source in zip(ends, sources, strict=True)]
    members = members if choice.held_out else mixture.members
    return Pool(sources, chosen, [members[number] for number in chosen])


def choose_examples(pool: Pool, training_order: "np.ndarray", choice: ExampleSelection) -> list[int]:
    """Indices of the examples to show, in display order.

    Args:
        pool: examples to choose from.
        training_order: indices of the examples in the order of training.
        choice: the user's choice.
    """
    import numpy as np

    members = np.concatenate(pool.members)
    removed = pool.column(lambda source: source.column("removed").to_numpy())
    # Trained examples come first, but the user may also ask for those that training never reaches.
    order = members if choice.held_out else np.concatenate([training_order, members])
    order = order[np.sort(np.unique(order, return_index=True)[1])]
    order = order[np.isin(order, members)]
    if choice.truncated:
        order = order[removed[order] > 0]
    if choice.longest:
        lengths = pool.column(lambda source: source.lengths()) + removed
        order = order[np.argsort(-lengths[order], kind="stable")]
    if choice.longest or choice.truncated:
        chosen: list[int] = order[: choice.number or FEW].tolist()
        return chosen
    number = choice.number or max(FEW, len(pool.chosen))
    source_of = np.searchsorted(pool.first(), order, side="right")
    firsts = np.sort(np.unique(source_of, return_index=True)[1])
    others = np.setdiff1d(np.arange(len(order)), firsts)
    spread: list[int] = order[np.sort(np.concatenate([firsts, others])[:number])].tolist()
    return spread
