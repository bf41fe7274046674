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
"""Rule that allows neither re-basing nor a highest rank -> why not."""
ABLATION, ABLATION_GRADIENT = "ablation", "ablation_gradient"
ABLATIONS = (ABLATION, ABLATION_GRADIENT)
"""The importances that are measured at events, on held-back training rows."""
ABLATING = (MOVE, MODULES_PER_LAYER)
"""The rules whose events may select by :data:`ABLATIONS`."""


@dataclass(frozen=True)
class Selection:
    """Bounds and options of an event's selection, beside the budget.

    Args:
        min_rank: least number of components that every layer keeps.
        max_rank: most components that a layer may keep in the end; None for no bound.
        regrow: prune softly before the final event, as in the paper: the gate is set to 0 and may grow back. Otherwise
            pruning is permanent.
        rebase: before an event selects, replace every layer's components by the singular vectors of its update, and
            score these without smoothing.

    Raises:
        ValueError: the values contradict each other.
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
        rule: what an event does: prune (fewer components stay), move (components go from layer to layer), grow (the
            best layers get more), modules_per_layer (the best modules of every block stay, and plan.json has ranks for
            later runs), or none (the ranks stay as adapter.ranks sets them, and the other keys of this section have no
            effect). docs/rules.md describes each.
        warmup_fraction: share of the run before pruning begins.
        final_fraction: share of the run after the last pruning event, with a fixed mask.
        interval: steps between two events; auto is about a twentieth of the steps from the first event to the last,
            and 1 if they are at most 20. For gate_sensitivity it is an interval of which the last event sees a large
            share; docs/method.md has the rule.
        importance: criterion that scores components: frobenius (the paper's), magnitude, squared_magnitude,
            gate_sensitivity (effect on the loss of removing them), loss_change (how much their movement has lowered the
            loss), or random (a baseline), all in docs/method.md; with rules move and modules_per_layer also ablation or
            ablation_gradient, in docs/rules.md.
        budget_unit: unit of the budget: components (the paper's), or parameters, of which the result then has as many
            as an adapter of uniform rank target_rank.
        smoothing: weight of the past in smoothed scores, in [0, 1). gate_sensitivity, loss_change and the ablations are
            not smoothed.
        equilibrium_weight: weight of the Dimensional Equilibrium Modulator in the loss until the last event; 0 is off.
        regrow: let components that were pruned before the last event grow back (the paper's gentle pruning). None grows
            back where adapter.train_gates is false.
        rebase: before an event, replace the components of each layer by the singular vectors of its update, which
            leaves the model's function unchanged, and score these without smoothing.
        min_rank: least number of components that every layer keeps.
        max_rank: most components that a layer may keep in the end; null for no bound.
        moved_per_event: number of components of the whole model that an event moves, with rule move.
        modules_per_layer: number of adapted modules that stay in every block, with the rule of that name.
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
            ValueError: see :class:`Selection`.
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
        ValueError: the message names both keys.
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
