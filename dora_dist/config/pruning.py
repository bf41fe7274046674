"""The configuration of pruning: plain values, no torch."""

from dataclasses import dataclass
from typing import Literal

from dora_dist.config.adapter import RANKS_FROM_DATA, UNIFORM, DynamicLoraConfig
from dora_dist.config.checks import require

Rule = Literal["prune", "move", "grow", "modules_per_layer", "none"]
PRUNE: Rule = "prune"
MOVE: Rule = "move"
GROW: Rule = "grow"
MODULES_PER_LAYER: Rule = "modules_per_layer"
NONE: Rule = "none"
FILL_SLOTS = (MOVE, GROW)
"""Rules whose new components take free adapter.slots."""
GATE_SENSITIVITY = "gate_sensitivity"
LOSS_CHANGE = "loss_change"
SUMMED = (GATE_SENSITIVITY, LOSS_CHANGE)
"""Importances that are summed over steps from gradients; all others are computed from the weights."""

BOUNDS = {
    MOVE: "adapter.slots is the bound",
    GROW: "adapter.slots is the bound",
    MODULES_PER_LAYER: "modules stay whole",
}
"""Rules that allow neither re-basing nor a highest rank, and why."""
ABLATION, ABLATION_GRADIENT = "ablation", "ablation_gradient"
ABLATIONS = (ABLATION, ABLATION_GRADIENT)
"""The importances that are measured at events, on held-back training rows."""
ABLATING = (MOVE, MODULES_PER_LAYER)
"""The rules whose events may select by :data:`ABLATIONS`."""


@dataclass(frozen=True)
class Selection:
    """Bounds and options of an event's selection, beside the budget.

    Args:
        min_rank: Least number of components that every layer keeps.
        max_rank: Most components that a layer may keep in the end; None for no bound.
        regrow: Prune softly before the final event, as in the paper: the gate is set to 0 and may grow back. Otherwise
            pruning is permanent.
        rebase: Before an event selects, replace every layer's components by the singular vectors of its update, and
            score these without smoothing.

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
                f"pruning.max_rank is {self.max_rank} and regrow is false: components that are pruned permanently at "
                "an early event could be needed to fill the final budget under the bound; set pruning.regrow to true, "
                "or pruning.max_rank to null"
            )


@dataclass(kw_only=True)
class PruningConfig:
    """When and how components are pruned (steps are optimizer steps).

    Args:
        rule: prune (from adapter.initial_rank down to the budget of adapter.target_rank), move (ALoRA's: the budget is
            met from the start; every event removes the lowest components, and the layers that lost none get as many, in
            their adapter.slots), grow (IncreLoRA's: from adapter.initial_rank, 1 by default, up to the budget; every
            event gives one component to each of the best layers; layers have a score of their own, and importance,
            smoothing and equilibrium_weight have no effect), modules_per_layer (a LoRA of rank adapter.target_rank; at
            the step of the last event, the best modules of every block stay, and plan.json gives them the whole budget,
            for later runs), or none (the ranks stay as adapter.ranks sets them, and the other keys of this section have
            no effect).
        warmup_fraction: share of the run before pruning begins.
        final_fraction: share of the run after the last pruning event, with a fixed mask.
        interval: steps between two events; auto is 1 if there are at most 20 steps from the first event to the last.
            With more steps, it is a twentieth of them, rounded down; or, for the importance gate_sensitivity, the
            interval of at least a twentieth and less than two of which the last event sees the largest share.
        importance: criterion that scores components: frobenius (the paper's share in the norm of their layer's update),
            magnitude (their norm as it is), squared_magnitude (its square), gate_sensitivity (first-order effect on the
            loss of removing them, summed over the steps since the last event), loss_change (how much their own movement
            has lowered the loss, to first order, summed over the steps of the run), or random (a baseline); with
            rules move and modules_per_layer also ablation (ALoRA's: the loss on scoring_rows without the component,
            minus the loss with it alone; two forwards of all rows for each component, so for small models) or
            ablation_gradient (the same to second order, by two backward passes over the rows).
        budget_unit: unit of the budget: components (the paper's), or parameters (a component has as many as its layer
            has inputs and outputs; the result then has as many parameters as an adapter of uniform rank target_rank).
        smoothing: weight of the past in the smoothed scores of weights, in [0, 1). The sums (gate_sensitivity,
            loss_change) and ablations are not smoothed.
        equilibrium_weight: weight of the Dimensional Equilibrium Modulator in the loss until the last event; 0 is off.
        regrow: a component pruned before the last event may grow back (the paper's gentle pruning); none does where
            adapter.train_gates is false.
        rebase: before an event, replace the components of each layer by the singular vectors of its update, which
            leaves the model's function unchanged, and score these without smoothing.
        min_rank: least number of components that every layer keeps.
        max_rank: most components that a layer may keep in the end; null for no bound.
        moved_per_event: with rule move, number of components of the whole model that an event moves.
        modules_per_layer: with the rule of that name, number of adapted modules that stay in every block.
        scoring_rows: number of training examples held back for scoring, with importance ablation or ablation_gradient.
    """

    rule: Rule = PRUNE
    warmup_fraction: float = 0.15
    final_fraction: float = 0.5
    interval: int | Literal["auto"] = "auto"
    importance: Literal[
        "frobenius",
        "magnitude",
        "squared_magnitude",
        "gate_sensitivity",
        "loss_change",
        "random",
        "ablation",
        "ablation_gradient",
    ] = "frobenius"
    budget_unit: Literal["components", "parameters"] = "components"
    smoothing: float = 0.9
    equilibrium_weight: float = 0.1
    regrow: bool = True
    rebase: bool = False
    min_rank: int = 0
    max_rank: int | None = None
    moved_per_event: int = 8
    modules_per_layer: int = 3
    scoring_rows: int = 32

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "final_fraction", "smoothing"):
            require(0 <= getattr(self, name) < 1, f"pruning.{name}", getattr(self, name), "lie in [0, 1)")
        warmup, final = self.warmup_fraction, self.final_fraction
        both = "pruning.warmup_fraction + pruning.final_fraction"
        require(warmup + final < 1, both, f"{warmup} + {final}", "be less than 1")
        given = self.interval
        require(given == "auto" or given >= 1, "pruning.interval", given, "be at least 1, or auto")
        require(self.equilibrium_weight >= 0, "pruning.equilibrium_weight", self.equilibrium_weight, "be at least 0")
        summed = self.importance in SUMMED
        require(
            not (self.rebase and summed), "pruning.rebase", "true", f"be false for the importance {self.importance}"
        )
        for name in ("moved_per_event", "modules_per_layer", "scoring_rows"):
            require(getattr(self, name) >= 1, f"pruning.{name}", getattr(self, name), "be at least 1")
        if (bound := BOUNDS.get(self.rule)) is not None:
            require(not self.rebase, "pruning.rebase", "true", f"be false for the rule {self.rule}")
            least = f"be null for the rule {self.rule}: {bound}"
            require(self.max_rank is None, "pruning.max_rank", self.max_rank, least)
        if self.rule not in ABLATING:
            other = f"be another for the rule {self.rule}: it is for the rules {' and '.join(ABLATING)}"
            require(self.importance not in ABLATIONS, "pruning.importance", self.importance, other)
        if self.rule == MODULES_PER_LAYER:
            require(self.min_rank == 0, "pruning.min_rank", self.min_rank, f"be 0 for the rule {self.rule}: {bound}")
        self.selection()  # refuses bounds that contradict each other

    @property
    def num_held_back(self) -> int:
        """Number of training examples that are not trained on."""
        return self.scoring_rows if self.importance in ABLATIONS else 0

    def selection(self) -> Selection:
        """The bounds and options of an event's selection.

        Raises:
            ValueError: See :class:`Selection`.
        """
        return Selection(self.min_rank, self.max_rank, self.regrow, self.rebase)


def check_slots(pruning: PruningConfig, adapter: DynamicLoraConfig) -> None:
    """Refuse slots that no component would ever take.

    Raises:
        ValueError: Names both keys.
    """
    if pruning.rule not in FILL_SLOTS and adapter.slots is not None and adapter.ranks not in RANKS_FROM_DATA:
        raise ValueError(
            f"adapter.slots is {adapter.slots}, but pruning.rule is {pruning.rule}, which fills none: leave it out"
        )


def check_prunes(pruning: PruningConfig, adapter: DynamicLoraConfig) -> None:
    """Refuse an adapter that these pruning settings cannot be applied to.

    Raises:
        ValueError: Names both keys.
    """
    if adapter.ranks != UNIFORM:
        raise ValueError(
            f"adapter.ranks is {adapter.ranks}, which fixes the ranks of the whole run, but pruning.rule is "
            f"{pruning.rule}: set it to none, or adapter.ranks to uniform"
        )
    if pruning.rule == GROW and not adapter.train_gates:
        raise ValueError(
            f"pruning.rule is {GROW}, under which new components begin with gates near 0, but adapter.train_gates is "
            "false: set it to true"
        )
    if pruning.importance == GATE_SENSITIVITY and not adapter.train_gates:
        raise ValueError(
            f"pruning.importance is {GATE_SENSITIVITY}, which needs gradients of the gates, but "
            "adapter.train_gates is false: set it to true, or choose another importance"
        )
    if pruning.max_rank is not None and not adapter.train_gates:
        raise ValueError(
            f"pruning.max_rank is {pruning.max_rank} and adapter.train_gates is false, so that no gate grows back: "
            "components that are pruned at an early event could be needed to fill the final budget under the bound; "
            "set adapter.train_gates to true, or pruning.max_rank to null"
        )
    if pruning.rule == GROW and pruning.min_rank > adapter.start_rank:
        raise ValueError(
            f"pruning.min_rank is {pruning.min_rank}, but pruning.rule is {GROW}, under which a layer may keep its "
            f"initial rank {adapter.start_rank}: raise adapter.initial_rank, or lower pruning.min_rank"
        )
    least, most, target = pruning.min_rank, pruning.max_rank, adapter.target_rank
    if least > target or (most is not None and most < target):
        raise ValueError(
            f"adapter.target_rank {target} is the mean over the layers, so it must lie between "
            f"pruning.min_rank {least} and pruning.max_rank {most}"
        )
