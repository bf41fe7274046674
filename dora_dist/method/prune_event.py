"""What a pruning event selects."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneEvent:
    """One pruning event, the same on every rank.

    Attributes:
        step: Optimizer step after which it took place.
        kept: Layer -> boolean mask, shape ``(r,)``, on the CPU; True where the component is kept.
        returned: Number of components kept now that were not after the event before: pruned ones that have grown back,
            or with rule move those that started anew.
        final: Whether the mask is fixed from here on.
        num_parameters: Entries of the kept components' vectors, over the whole model.
        scores: Layer -> mean score, before the event, of its components that no mask leaves out; 0 for a layer without
            any. None where nothing was scored.
        planned: Layer -> components that other runs shall have, where the final event plans others than it keeps.
    """

    step: int
    kept: Mapping[str, Tensor]
    returned: int
    final: bool
    num_parameters: int
    scores: Mapping[str, float] | None = None
    planned: Mapping[str, int] | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> number of components kept."""
        return {name: int(mask.sum()) for name, mask in self.kept.items()}

    @property
    def num_kept(self) -> int:
        """Number of components kept in the whole model."""
        return sum(self.ranks.values())
