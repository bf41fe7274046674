"""What a pruning event was: recorded by a run, read by everything that looks at one."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PruneEvent:
    """One pruning event, the same on every rank.

    Attributes:
        step: optimizer step after which it took place.
        num_kept: components of the whole model that were kept.
        kept: layer -> indices of the components kept.
        returned: components kept now that the event before had pruned.
        final: whether the mask is fixed from here on.
        num_parameters: entries of the kept components' vectors, over the whole model; None in older records.
    """

    step: int
    num_kept: int
    kept: Mapping[str, list[int]]
    returned: int
    final: bool
    num_parameters: int | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> number of components kept."""
        return {name: len(indices) for name, indices in self.kept.items()}
