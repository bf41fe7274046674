"""The method in motion: joins schedule, importance, agreement and selection, and owns all state of the method."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from dora_dist.adapter.components import stacks_of
from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.adapter.unfolded import load_masks
from dora_dist.config.pruning import Selection
from dora_dist.console.errors import ExpectedRunError, mark_common
from dora_dist.distributed.agreement import Agreement, digest_tensors
from dora_dist.distributed.engine import scale_entries, write_entries, zero_entries
from dora_dist.method.budget import Budget
from dora_dist.method.importance import Components, score_layers
from dora_dist.method.prune_event import PruneEvent
from dora_dist.method.rebasing import singular_components
from dora_dist.method.regularizer import penalty_of_stacks
from dora_dist.training.criterion import Criterion, SmoothedScores


class BudgetMissedError(ExpectedRunError):
    """The run ended without the pruning that its configuration promised."""


class NonFiniteAdapterError(ExpectedRunError):
    """The adapter holds NaN or infinite values."""


class DynamicRankController:
    """Scores after every optimizer step, prunes when the schedule says so, and proves that all ranks agree.

    Args:
        layers: Adapted layers by name; the same names on every rank.
        budget: What the components of ``layers`` may cost over the run.
        agreement: Collectives over the ranks.
        criterion: What makes the scores, of the components of ``layers`` in the order of their names; by default the
            paper's, with its smoothing of 0.9.
        selection: How events select; by default without bounds, and with regrowth.
        head: Parameters by name that are trained beside the adapter; the ranks prove that they agree on these too.

    Attributes:
        step: Optimizer steps seen so far.
        kept: Layer -> boolean mask, shape ``(r,)``, on the CPU: the components that the latest event kept; all of them
            before the first event.
        failure: Why this rank could not score, or None. It ends the run on all ranks in the next exchange.

    Raises:
        ValueError: The bounds of ``selection`` do not admit the final budget.
    """

    def __init__(
        self,
        layers: Mapping[str, DynamicLoraLinear],
        budget: Budget,
        agreement: Agreement,
        *,
        criterion: Criterion | None = None,
        selection: Selection | None = None,
        head: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.layers = dict(sorted(layers.items()))
        self.budget = budget
        self.schedule = budget.schedule
        self.agreement = agreement
        self.selection = selection or Selection()
        self.head = dict(sorted((head or {}).items()))
        self.step = 0
        self.failure: str | None = None
        sizes = {name: layer.gate.numel() for name, layer in self.layers.items()}
        self.kept: Mapping[str, Tensor] = {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
        self._sizes = list(sizes.values())
        device = next(iter(self.layers.values())).gate.device
        self.criterion = criterion or SmoothedScores(score_layers, 0.9, sum(self._sizes), device)
        if self.selection.rebase:
            self.criterion.rescore(self._components())
        # Refuse bounds that cannot be met before the run; all other budgets lie above the final one.
        if self.schedule.final_step:
            least, most = self.selection.min_rank, self.selection.max_rank
            self.budget.select(self.scores, self.schedule.final_step, least, most)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Layer -> scores, shape ``(r,)``, float64; local to this rank until an event averages them."""
        return self._by_layer(self.criterion.scores)

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> components that no mask has left out."""
        return {name: int(layer.component_mask.sum()) for name, layer in self.layers.items()}

    @property
    def num_kept(self) -> int:
        """Number of components that the latest event kept in the whole model."""
        return sum(int(mask.sum()) for mask in self.kept.values())

    @property
    def finished_pruning(self) -> bool:
        """Whether the final event has taken place, after which the mask is fixed and DEM is off."""
        return self.step >= self.schedule.final_step

    def penalty(self) -> Tensor | None:
        """The Dimensional Equilibrium Modulator of all layers (scalar), or None once the mask is fixed.

        To be differentiated together with the forward that went before, where there was one.
        """
        if self.finished_pruning:
            return None
        layers = list(self.layers.values())
        stacks = stacks_of(layers, layers[0].gathered)
        return penalty_of_stacks(stacks.rows, stacks.columns)

    def before_first_step(self) -> PruneEvent | None:
        """The event that fixes the ranks of the start, where no other follows: it changes nothing."""
        if not self.finished_pruning:
            return None
        return self._event(self.kept, returned=0, final=True)

    def after_optimizer_step(self, step: int) -> PruneEvent | None:
        """Score, smooth and, where due, prune. To be called once after every optimizer step, on every rank.

        Args:
            step: optimizer steps taken so far, counted from 1.

        Returns:
            The event, if there was one.

        Raises:
            RankFailedError: At an event, on all ranks: a rank has failed to score (:attr:`failure`), or its scores are
                not finite.
            DisagreementError: the ranks hold different adapters, on all ranks.
        """
        assert step == self.step + 1, f"step {step} after step {self.step}: each step must be seen exactly once"
        finished = self.finished_pruning
        self.step = step
        if finished:
            return None
        event_is_due = self.schedule.is_prune_step(step)
        # What re-basing makes at an event is scored then, without the past.
        if event_is_due or not self.selection.rebase:
            self._update_scores()
        if not event_is_due:
            return None
        self.agreement.raise_together(self.failure or self._flaw_of_scores(), f"scoring components by step {step}")
        self.verify(f"the adapter before the pruning event of step {step}")
        if self.selection.rebase:
            self._rebase()
        # One flat tensor, one all-reduce; from here on every rank computes from the reduced values only.
        event = self._select(step, self._by_layer(self.agreement.mean(self.criterion.scores)))
        self._apply(event)
        self.criterion.after_event()
        self.kept = event.kept
        return event

    def verify(self, what: str) -> None:
        """Prove that all ranks hold the same adapter, head, masks, budget and step.

        Raises:
            DisagreementError: they do not.
        """
        position = f"{self.step}/{self.budget}"
        digests = {"step and budget": sha256(position.encode()).digest()}
        for name, layer in self.layers.items():
            masks = (layer.component_mask, self.kept[name])
            digests[name] = digest_tensors(layer.lora_a, layer.gate, layer.lora_b, *masks)
        digests |= {f"{name} of the head": digest_tensors(parameter) for name, parameter in self.head.items()}
        self.agreement.check_equal(digests, what)

    def check_finite(self) -> None:
        """Refuse an adapter that is no longer one.

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
        """Short fingerprint of which components are alive (gate not 0, mask set), for the log."""
        alive = torch.cat([layer.effective_gate().detach().cpu() != 0 for layer in self.layers.values()])
        return digest_tensors(alive).hex()[:16]

    def finish(self) -> None:
        """Check at the end of a run that the method did what its configuration promised.

        Raises:
            BudgetMissedError: the final event never came, or the kept components are not the budget.
            DisagreementError: the ranks hold different adapters.
        """
        self.verify("the adapter at the end of the run")
        kept = self.ranks
        what = f"{sum(kept.values())} components (cost {self.budget.spent(kept)}) are left"
        wanted = f"the budget {self.budget.final}"
        if not self.finished_pruning:
            early = f"the run ended at step {self.step} before the final pruning event of step"
            raise mark_common(BudgetMissedError(f"{early} {self.schedule.final_step}: {what} instead of {wanted}"))
        if not self.budget.is_met_by(kept):
            raise mark_common(BudgetMissedError(f"{what} instead of {wanted}"))

    def state_dict(self) -> dict[str, Tensor]:
        """Masks, scores and what the latest event kept, by layer, as flat names; see :meth:`load_state_dict`."""
        state = {f"{name}.component_mask": layer.component_mask.cpu() for name, layer in self.layers.items()}
        # Copies: safetensors does not write parts of one tensor.
        state |= {f"{name}.scores": scores.clone() for name, scores in self.scores.items()}
        state |= {f"{name}.kept": mask.clone() for name, mask in self.kept.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after ``step``, on every rank.

        Raises:
            RankFailedError: a rank could not load the state, on all ranks.
            DisagreementError: the ranks loaded different states.
        """
        failure = None
        try:
            self.criterion.scores.copy_(torch.cat([state[f"{name}.scores"] for name in self.layers]))
            load_masks(state, self.layers)
            self.kept = {name: state[f"{name}.kept"] for name in self.layers}
        except (KeyError, RuntimeError) as error:
            failure = f"the saved state does not fit the model: {error!r}"
        self.agreement.raise_together(failure, "loading the state of the method")
        self.step = step
        self.verify(f"the adapter resumed from step {step}")

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layers, torch.split(flat, self._sizes), strict=True))

    def _components(self) -> list[Components]:
        layers = self.layers.values()
        gates = torch.cat([layer.gate.detach() for layer in layers])
        gates = gates.where(torch.cat([layer.component_mask for layer in layers]), 0).split(self._sizes)
        return [(layer.lora_a, gate, layer.lora_b) for layer, gate in zip(layers, gates, strict=True)]

    @torch.no_grad()
    def _rebase(self) -> None:
        """The ranks hold the same components, and take the mean of what they make of them: kinds of processors differ
        in the last bits of a decomposition."""
        for layer in self.layers.values():
            kept = layer.component_mask
            parts = layer.lora_a[kept], layer.gate[kept], layer.lora_b[:, kept]
            if not len(parts[1]):
                continue
            flat = self.agreement.mean(torch.cat([part.flatten() for part in singular_components(*parts)]))
            whole = (layer.lora_a, layer.gate, layer.lora_b)
            masks = (kept.unsqueeze(1).expand_as(layer.lora_a), kept, kept.expand_as(layer.lora_b))
            sizes = [part.numel() for part in parts]
            for parameter, chosen, new in zip(whole, masks, torch.split(flat, sizes), strict=True):
                values = torch.zeros_like(parameter, dtype=torch.float64).masked_scatter_(chosen, new)
                write_entries(parameter, values, chosen)
        self.criterion.rescore(self._components())

    def _update_scores(self) -> None:
        """Never raises: a failure is kept in :attr:`failure` for the next exchange, where all ranks learn of it."""
        try:
            self.criterion.update(self._components(), self.agreement)
        except Exception as error:
            self.failure = self.failure or f"{type(error).__name__} after step {self.step}: {error}"

    def _flaw_of_scores(self) -> str | None:
        """A non-finite score stays in the average for ever, so that looking at events is enough."""
        for name, scores in self.scores.items():
            if not torch.isfinite(scores).all():
                return f"layer {name} has non-finite scores {scores.tolist()}"
        if self.budget.at(self.step) < self.budget.initial and not self.criterion.scores.any():
            return "all scores are 0, so that there is nothing to select by: no step has changed the adapter"
        return None

    def _select(self, step: int, scores: dict[str, Tensor]) -> PruneEvent:
        final, selection = step == self.schedule.final_step, self.selection
        eligible = None if selection.regrow else {name: layer.component_mask for name, layer in self.layers.items()}
        most = selection.max_rank if final else None
        kept = self.budget.select(scores, step, selection.min_rank, most, eligible)
        # Re-basing makes other components at every event, of which none has been there before.
        returned = 0 if selection.rebase else sum(int((kept[name] & ~self.kept[name]).sum()) for name in kept)
        return self._event(kept, returned, final)

    def _event(self, kept: Mapping[str, Tensor], returned: int, final: bool) -> PruneEvent:
        widths = {name: layer.lora_a.shape[1] + layer.lora_b.shape[0] for name, layer in self.layers.items()}
        parameters = sum(int(mask.sum()) * widths[name] for name, mask in kept.items())
        return PruneEvent(step=self.step, kept=kept, returned=returned, final=final, num_parameters=parameters)

    @torch.no_grad()
    def _apply(self, event: PruneEvent) -> None:
        for name, layer in self.layers.items():
            keep = event.kept[name].to(layer.gate.device)
            zero_entries(layer.gate, keep)
            if event.final or not self.selection.regrow:
                layer.component_mask.copy_(keep)
                factor = layer.follow_mask()
                if factor != 1:
                    scale_entries(layer.lora_b, factor)
