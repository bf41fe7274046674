"""The configuration of pruning: plain values, no torch."""

from dataclasses import dataclass
from typing import Literal

from dora_dist.config.adapter import UNIFORM, DynamicLoraConfig
from dora_dist.config.checks import require

Rule = Literal["prune", "none"]
PRUNE: Rule = "prune"
NONE: Rule = "none"
GATE_SENSITIVITY = "gate_sensitivity"
"""The importance that is summed over steps from gradients; all others are computed from the weights."""


@dataclass(frozen=True)
class Selection:
    """How an event may select, beside the budget.

    Args:
        min_rank: Components that every layer keeps at least.
        max_rank: Components that any layer keeps at most in the end; None for no bound.
        regrow: Prune softly before the final event (the gate is set to 0 and may grow back), as the paper does;
            otherwise pruned components stay out for good.
        rebase: Before an event selects, turn every layer's components into the singular vectors of its update, and
            score those as they are then, without the past.

    Raises:
        ValueError: The values contradict each other.
    """

    min_rank: int = 0
    max_rank: int | None = None
    regrow: bool = True
    rebase: bool = False

    def __post_init__(self) -> None:
        require(self.min_rank >= 0, "pruning.min_rank", self.min_rank, "be at least 0")
        if self.max_rank is not None and not self.regrow:
            raise ValueError(
                f"pruning.max_rank is {self.max_rank} and regrow is false: what is pruned for good early could be "
                "needed to fill the final budget under the bound; set pruning.regrow to true, or pruning.max_rank to "
                "null"
            )


@dataclass(kw_only=True)
class PruningConfig:
    """When and how components are pruned (steps are optimizer steps).

    Args:
        rule: prune (from adapter.initial_rank down to the budget of adapter.target_rank), or none (the ranks stay as
            adapter.ranks says, and the other keys of this section have no effect).
        warmup_fraction: share of the run before pruning begins.
        final_fraction: share of the run after the last pruning event, with a fixed mask.
        interval: steps between two events; auto for a twentieth of those from the first event to the last.
        importance: by what components are judged: frobenius (the paper's share in the norm of their layer's update),
            magnitude (their norm as it is), squared_magnitude (its square), gate_sensitivity (first-order effect on the
            loss of removing them, summed over the steps since the last event), or random (to compare with).
        budget_unit: what the budget counts: components (the paper's), or parameters, of which a component has as many
            as its layer has inputs and outputs, so that the result has the parameters of a uniform rank target_rank.
        smoothing: weight of the past in the smoothed scores, in [0, 1); gate_sensitivity is summed instead.
        equilibrium_weight: weight of the Dimensional Equilibrium Modulator in the loss until the last event; 0 is off.
        regrow: a component pruned before the last event may grow back (the paper's gentle pruning).
        rebase: before an event, turn the components of each layer into the singular vectors of its update, which leaves
            the model as it is, and judge those; smoothing is not used then.
        min_rank: components that every layer keeps at least.
        max_rank: components that any layer keeps at most in the end; null for no bound.
    """

    rule: Rule = PRUNE
    warmup_fraction: float = 0.15
    final_fraction: float = 0.5
    interval: int | Literal["auto"] = "auto"
    importance: Literal["frobenius", "magnitude", "squared_magnitude", "gate_sensitivity", "random"] = "frobenius"
    budget_unit: Literal["components", "parameters"] = "components"
    smoothing: float = 0.9
    equilibrium_weight: float = 0.1
    regrow: bool = True
    rebase: bool = False
    min_rank: int = 0
    max_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "final_fraction", "smoothing"):
            require(0 <= getattr(self, name) < 1, f"pruning.{name}", getattr(self, name), "lie in [0, 1)")
        total = self.warmup_fraction + self.final_fraction
        require(total < 1, "pruning.warmup_fraction + pruning.final_fraction", total, "be less than 1")
        given = self.interval
        require(given == "auto" or given >= 1, "pruning.interval", given, "be at least 1, or auto")
        require(self.equilibrium_weight >= 0, "pruning.equilibrium_weight", self.equilibrium_weight, "be at least 0")
        summed = self.importance == GATE_SENSITIVITY
        require(
            not (self.rebase and summed), "pruning.rebase", "true", f"be false for the importance {GATE_SENSITIVITY}"
        )
        self.selection()  # refuses bounds that contradict each other

    def selection(self) -> Selection:
        """The part that an event selects by.

        Raises:
            ValueError: See :class:`Selection`.
        """
        return Selection(self.min_rank, self.max_rank, self.regrow, self.rebase)


def check_prunes(pruning: PruningConfig, adapter: DynamicLoraConfig) -> None:
    """Refuse an adapter that cannot be pruned so.

    Raises:
        ValueError: Names both keys.
    """
    if adapter.ranks != UNIFORM:
        raise ValueError(
            f"adapter.ranks is {adapter.ranks}, which are the ranks of the whole run, but pruning.rule is "
            f"{pruning.rule}: set it to none, or adapter.ranks to uniform"
        )
    if pruning.importance == GATE_SENSITIVITY and not adapter.train_gates:
        raise ValueError(
            f"pruning.importance is {GATE_SENSITIVITY}, which needs gradients of the gates, but "
            "adapter.train_gates is false: set it to true, or choose another importance"
        )
    least, most, target = pruning.min_rank, pruning.max_rank, adapter.target_rank
    if least > target or (most is not None and most < target):
        raise ValueError(
            f"adapter.target_rank {target} is the mean over the layers, so it must lie between "
            f"pruning.min_rank {least} and pruning.max_rank {most}"
        )
