"""The pruning controller: connects schedule, importance, agreement and selection, and owns the method's state."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from dora_dist.adapter.components import stacks_of
from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.unfolded import load_masks
from dora_dist.console.errors import ExpectedRunError, mark_common
from dora_dist.distributed.agreement import Agreement, digest_tensors, show_unexpected
from dora_dist.distributed.engine import Moments
from dora_dist.method.budget import Budget
from dora_dist.method.importance import score_layers
from dora_dist.method.prune_event import PruneEvent
from dora_dist.method.regularizer import penalty_of_stacks
from dora_dist.training.criterion import Criterion, SmoothedScores
from dora_dist.training.rules.masks import set_mask
from dora_dist.training.rules.prune import Prune
from dora_dist.training.rules.rule import Rule


class BudgetMissedError(ExpectedRunError):
    """The run ended before its last pruning event, or its number of components is not the budget."""


class NonFiniteAdapterError(ExpectedRunError):
    """The adapter holds NaN or infinite values."""


class DynamicRankController:
    """Updates scores after every optimizer step, holds the scheduled events, and verifies that all ranks agree.

    Args:
        layers: adapted layers by name; the same names on every rank.
        budget: budget of the components of ``layers`` over the run.
        agreement: collectives over the ranks.
        criterion: criterion that scores the components of ``layers``, in the order of their names; by default the
            paper's criterion with smoothing 0.9.
        rule: rule by which events change ``layers``; by default pruning, without bounds and with regrowth.
        head: other trained parameters by name; the ranks verify that they agree on these too.

    Attributes:
        step: number of optimizer steps seen so far.
        kept: layer -> boolean mask, shape ``(r,)``, on the CPU: the components that the latest event kept; before the
            first event, those that are not masked.
        planned: layer -> number of components that the final event plans for later runs. None before that event, or if
            the plan is what the event kept.
        moments: the optimizer's moments, once an engine has prepared the model.
        failure: reason why this rank could not score, or None. It ends the run on all ranks in the next exchange.

    Raises:
        ValueError: the bounds of the rule's selection do not admit the final budget.
    """

    def __init__(
        self,
        layers: Mapping[str, DynamicLoraLinear],
        budget: Budget,
        agreement: Agreement,
        *,
        criterion: Criterion | None = None,
        rule: Rule | None = None,
        head: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.layers = dict(sorted(layers.items()))
        self.budget = budget
        self.schedule = budget.schedule
        self.agreement = agreement
        self.rule = rule or Prune(layers, budget)
        self.head = dict(sorted((head or {}).items()))
        self.step = 0
        self.failure: str | None = None
        self.moments: Moments | None = None
        self._sizes = [layer.gate.numel() for layer in self.layers.values()]
        self.kept: Mapping[str, Tensor] = self._masks()
        self.planned: Mapping[str, int] | None = None
        self.criterion = criterion or SmoothedScores(score_layers, 0.9, self.layers.values())
        if self.rule.renews:
            self.criterion.rescore()
        self.rule.begin(self.kept)

    def attach(self, moments: Moments) -> None:
        """Use the moments of the optimizer, once an engine has prepared the model."""
        self.moments = moments
        moments.slow_down(lambda: self.rule.rates(self.step + 1, self.kept))

    @property
    def scores(self) -> dict[str, Tensor]:
        """Layer -> scores, shape ``(r,)``, float64; local to this rank until an event averages them."""
        return self._by_layer(self.criterion.scores)

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> number of unmasked components."""
        return {name: int(mask.sum()) for name, mask in self._masks().items()}

    @property
    def plan(self) -> Mapping[str, int]:
        """Layer -> number of components, at the cost of the final budget: the remaining ones, or the rule's plan."""
        return self.planned or self.ranks

    @property
    def num_kept(self) -> int:
        """Number of components that the latest event kept in the whole model."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def finished_pruning(self) -> bool:
        """Whether the final event has taken place. From then on the mask is fixed and DEM is off."""
        return self.step >= self.schedule.final_step

    def penalty(self) -> Tensor | None:
        """The Dimensional Equilibrium Modulator over all layers, a scalar. None once the mask is fixed, or if the rule
        does not use it.

        Where a forward came before, its graph is shared: differentiate both together.
        """
        if self.finished_pruning or not self.rule.regularized:
            return None
        layers = list(self.layers.values())
        stacks = stacks_of(layers, layers[0].gathered)
        return penalty_of_stacks(stacks.rows, stacks.columns)

    def fix_ranks(self, ranks: Mapping[str, int]) -> None:
        """Keep the first slots of every layer and mask the others, before the first step.

        Args:
            ranks: layer -> number of components to keep, at most its slots; the same on every rank.
        """
        for name, layer in self.layers.items():
            set_mask(layer, torch.arange(len(layer.gate), device=layer.gate.device) < ranks[name])
        self.kept = self._masks()

    def before_first_step(self) -> PruneEvent | None:
        """The event that fixes the initial ranks where no other event follows; it changes nothing."""
        if not self.finished_pruning:
            return None
        return self._event(self.kept)

    def after_optimizer_step(self, step: int) -> PruneEvent | None:
        """Update the scores and hold an event if one is due. Must be called once after every optimizer step, on every
        rank.

        Args:
            step: number of optimizer steps taken so far, counted from 1.

        Returns:
            The event, if there was one.

        Raises:
            RankFailedError: at an event, on all ranks: a rank has failed to score (:attr:`failure`), or its scores are
                not finite, or all are 0 where the event selects by them.
            DisagreementError: the ranks hold different adapters, on all ranks.
        """
        assert step == self.step + 1, f"step {step} after step {self.step}: each step must be seen exactly once"
        finished = self.finished_pruning
        self.step = step
        if finished:
            return None
        event_is_due = self.rule.is_due(step)
        if event_is_due or not (self.rule.renews or self.criterion.at_events_only):
            self._update_scores()
        if not event_is_due:
            return None
        self.agreement.raise_together(self.failure or self._flaw_of_scores(), f"scoring components by step {step}")
        self.verify(f"the adapter before the pruning event of step {step}")
        self.rule.prepare(self.criterion, self.agreement)
        # One flat tensor, one all-reduce; from here on every rank computes from the reduced values only, on the CPU.
        scores = self._by_layer(self.agreement.mean(self.criterion.scores).cpu())
        means = self._mean_scores(scores)
        kept, self.kept = self.kept, self.rule.select(step, scores, self.kept)
        self.rule.apply(step, kept, self.kept, self.moments)
        self.criterion.after_event()
        if self.rule.reuses:
            self.criterion.forget(torch.cat([mask & ~kept[name] for name, mask in self.kept.items()]))
        if self.finished_pruning:
            self.planned = self.rule.plan(step, scores)
            self.criterion.end()
        return self._event(kept, means)

    def verify(self, what: str) -> None:
        """Verify that all ranks hold the same adapter, head, masks, budget, plan and step.

        Raises:
            DisagreementError: the ranks differ.
        """
        position = f"{self.step}/{self.budget}/{self.planned}"
        digests = {"step, budget and plan": sha256(position.encode()).digest()}
        for name, layer in self.layers.items():
            masks = (layer.component_mask, self.kept[name])
            digests[name] = digest_tensors(layer.lora_a, layer.gate, layer.lora_b, *masks)
        digests["state of the rule"] = digest_tensors(*self.rule.state.values())
        digests |= {f"{name} of the head": digest_tensors(parameter) for name, parameter in self.head.items()}
        self.agreement.check_equal(digests, what)

    def check_finite(self) -> None:
        """Refuse an adapter or head that is not finite.

        Raises:
            NonFiniteAdapterError: a parameter of the adapter or of the head is NaN or infinite.
        """
        for name, layer in self.layers.items():
            for parameter in (layer.lora_a, layer.gate, layer.lora_b):
                if not torch.isfinite(parameter).all():
                    raise NonFiniteAdapterError(f"step {self.step}: the adapter of {name} is not finite")
        for name, parameter in self.head.items():
            if not torch.isfinite(parameter).all():
                raise NonFiniteAdapterError(f"step {self.step}: {name} of the head is not finite")

    def allocation_digest(self) -> str:
        """Short hash of which components are alive (gate not 0, not masked), for the log."""
        alive = torch.cat([layer.effective_gate().detach() for layer in self.layers.values()]) != 0
        return digest_tensors(alive).hex()[:16]

    def finish(self) -> None:
        """Check at the end of a run that the configured budget was met.

        Raises:
            BudgetMissedError: the final event never took place, or the components of :attr:`plan` do not spend the
                budget.
            DisagreementError: the ranks hold different adapters.
        """
        self.verify("the adapter at the end of the run")
        kept = self.plan
        verb = "are planned" if self.planned else "are left"
        what = f"{sum(kept.values())} components (cost {self.budget.spent(kept)}) {verb}"
        wanted = f"the budget {self.budget.final}"
        if not self.finished_pruning:
            early = f"the run ended at step {self.step} before the final pruning event of step"
            raise mark_common(BudgetMissedError(f"{early} {self.schedule.final_step}: {what} instead of {wanted}"))
        if not self.budget.is_met_by(kept):
            raise mark_common(BudgetMissedError(f"{what} instead of {wanted}"))

    def state_dict(self) -> dict[str, Tensor]:
        """Masks, scores, the components that the latest event kept and the final event's plan, as a flat dictionary of
        tensors; see :meth:`load_state_dict`."""
        state = {f"{name}.component_mask": layer.component_mask.cpu() for name, layer in self.layers.items()}
        # Copies, because safetensors cannot write views of one tensor.
        state |= {f"{name}.scores": scores.clone() for name, scores in self.scores.items()}
        state |= {f"{name}.kept": mask.clone() for name, mask in self.kept.items()}
        state |= {f"{name}.planned": torch.tensor(rank) for name, rank in (self.planned or {}).items()}
        return state | {name: tensor.cpu().clone() for name, tensor in self._own_state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """Restore the state after ``step``, on every rank.

        Raises:
            RankFailedError: a rank could not load the state, on all ranks.
            DisagreementError: the ranks loaded different states.
        """
        failure = None
        try:
            self.criterion.scores.copy_(torch.cat([state[f"{name}.scores"] for name in self.layers]))
            load_masks(state, self.layers)
            self.kept = {name: state[f"{name}.kept"] for name in self.layers}
            for name, tensor in self._own_state().items():
                tensor.copy_(state[name])
            planned = {name: state.get(f"{name}.planned") for name in self.layers}
            self.planned = {name: int(rank) for name, rank in planned.items() if rank is not None} or None
        except (KeyError, RuntimeError) as error:
            failure = f"the saved state does not fit the model: {error!r}"
        self.agreement.raise_together(failure, "loading the state of the method")
        self.step = step
        if self.finished_pruning:
            self.criterion.end()
        self.verify(f"the adapter resumed from step {step}")

    def _own_state(self) -> dict[str, Tensor]:
        """State of the criterion (without its scores) and of the rule. No layer's name can equal one of these keys."""
        parts = {"criterion": self.criterion.state, "rule": self.rule.state}
        return {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def _masks(self) -> dict[str, Tensor]:
        """Layer -> boolean, shape ``(r,)``, on the CPU: unmasked components. One copy for all layers."""
        return self._by_layer(torch.cat([layer.component_mask for layer in self.layers.values()]).cpu())

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layers, torch.split(flat, self._sizes), strict=True))

    def _update_scores(self) -> None:
        """Update the scores. Never raises: a failure is kept in :attr:`failure` until the next exchange reports it to
        all ranks."""
        try:
            self.criterion.update(self.agreement)
        except Exception as error:
            if self.failure is None:
                self.failure = f"{type(error).__name__} after step {self.step}: {error}"
                show_unexpected(error)

    def _flaw_of_scores(self) -> str | None:
        """Why events cannot select by the scores, or None. Called at events only, because a non-finite score never
        leaves the average."""
        for name, scores in self._by_layer(self.criterion.scores.cpu()).items():
            if not torch.isfinite(scores).all():
                return f"layer {name} has non-finite scores {scores.tolist()}"
        if self.rule.chooses(self.step) and not self.criterion.scores.any():
            return (
                "all scores are 0, so there is nothing to select by: no step with a learning rate above 0 has changed "
                "the adapter yet. Train for more steps (training.max_steps), or raise pruning.warmup_fraction"
            )
        return None

    def _mean_scores(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """Layer -> mean score of its unmasked components; 0 for a layer without any."""
        alive = {name: scores[name][mask] for name, mask in self._masks().items()}
        return {name: float(values.mean()) if values.numel() else 0.0 for name, values in alive.items()}

    def _event(self, before: Mapping[str, Tensor], scores: Mapping[str, float] | None = None) -> PruneEvent:
        """The event just held, given what the previous event kept and the layers' mean scores."""
        # A rule that renews replaces all components at every event, so none of them existed before.
        new = 0 if self.rule.renews else sum(int((mask & ~before[name]).sum()) for name, mask in self.kept.items())
        widths = {name: layer.lora_a.shape[1] + layer.lora_b.shape[0] for name, layer in self.layers.items()}
        return PruneEvent(
            step=self.step,
            kept=self.kept,
            returned=new,
            final=self.finished_pruning,
            num_parameters=sum(int(mask.sum()) * widths[name] for name, mask in self.kept.items()),
            scores=scores,
            planned=self.planned,
        )
