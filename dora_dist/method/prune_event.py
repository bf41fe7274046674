"""The result of a pruning event."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneEvent:
    """One pruning event, the same on every rank.

    Attributes:
        step: optimizer step after which the event took place.
        kept: layer -> boolean mask, shape ``(r,)``, on the CPU; True where the component is kept.
        returned: number of components that are kept now but were not after the previous event: pruned components that
            have regrown, or, with rule move, new components.
        final: whether the mask is fixed from here on.
        num_parameters: total number of entries in the kept components' vectors, over the whole model.
        scores: layer -> mean score, before the event, of its unmasked components; 0 for a layer without any. None if
            nothing was scored.
        planned: layer -> number of components for a later run, if the final event's plan differs from what it keeps.
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
