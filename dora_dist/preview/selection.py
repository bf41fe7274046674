"""Which examples a preview shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from dora_dist.data.mixture import Mixture
    from dora_dist.data.prepared import PreparedSource
    from dora_dist.setup.run_data import RunData

FEW = 3
"""Examples that are shown, unless there are more sources."""


@dataclass(frozen=True, kw_only=True)
class ExampleSelection:
    """Which examples to look at.

    Attributes:
        number: of examples; None for a few, with one of every source.
        source: only those of this source.
        held_out: of the held-out sources instead of the training ones.
        longest: the longest ones instead of those that come first.
        truncated: only those that were truncated.
    """

    number: int | None = None
    source: str | None = None
    held_out: bool = False
    longest: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class Pool:
    """The sources that are looked at, and which examples of them take part.

    Attributes:
        sources: of the part of the data, training or held-out; indices of examples run through all of them.
        chosen: numbers of those that are looked at.
        members: indices of the examples that take part, of each chosen source.
    """

    sources: "Sequence[PreparedSource]"
    chosen: Sequence[int]
    members: "Sequence[np.ndarray]"

    def first(self) -> "np.ndarray":
        """Index of the first example of each source, and the number of all."""
        import numpy as np

        return np.cumsum([0, *(source.counts.examples for source in self.sources)])

    def column(self, of: Callable[["PreparedSource"], "np.ndarray"]) -> "np.ndarray":
        """A number for every example of all sources."""
        import numpy as np

        return np.concatenate([of(source) for source in self.sources])


def build_pool(data: "RunData", mixture: "Mixture", choice: ExampleSelection) -> Pool:
    """The sources of the choice.

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
    """Indices of the examples to show, in the order in which they are shown.

    Args:
        pool: to choose from.
        training_order: indices of the examples, as training sees them.
        choice: of the user.
    """
    import numpy as np

    members = np.concatenate(pool.members)
    removed = pool.column(lambda source: source.column("removed").to_numpy())
    # Training first; what it never reaches can be asked for too.
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
