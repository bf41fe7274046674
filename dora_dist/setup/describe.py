"""What a run would do, found out without reading a weight: ``dora_dist.train --dry-run``."""

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from dora_dist.config.pruning import GROW, MODULES_PER_LAYER, MOVE, PruningConfig
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.data import prepared
from dora_dist.method.budget import Budget
from dora_dist.runs.speed import Speed
from dora_dist.setup.forecast import TimeForecast, forecast_memory
from dora_dist.setup.resolve import ResolvedRun


def describe(config: RunConfig, resolved: ResolvedRun, world_size: int, speed: Speed | None = None) -> str:
    """The run in words: data, steps, budget, memory, and time where a speed is known.

    Args:
        config: the run's configuration.
        resolved: what the run has resolved of it.
        world_size: processes that the steps were counted for.
        speed: speed of the run; None where it is not known.
    """
    data, mixture, plan = resolved.data, resolved.mixture, resolved.plan
    num_steps, layers = resolved.arguments.max_steps, resolved.initial_ranks
    rows = plan.num_rows // num_steps
    if config.model.recompute_layers is not None:
        config = replace(config, model=replace(config.model, recompute_layers=resolved.recomputation.count))
    kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
    what = "rows of packed examples" if mixture.batching == "packed" else "examples"
    parts = [
        f"model {config.model.path}: {len(layers)} adapted layers ({', '.join(kinds)})"
        + (f"\n  {resolved.unadapted}" if resolved.unadapted else ""),
        prepared.render("training data", data.train),
        *([prepared.render("held-out data", data.evaluation)] if data.evaluation else []),
        f"{num_steps} optimizer steps of {rows} {what} on {world_size} process{'es' * (world_size > 1)}, "
        f"{plan.num_rows / mixture.rows_per_epoch:.2f} passes over the data; "
        f"{resolved.padding_share():.1%} of the computed tokens are padding",
        _budget(resolved.budget, config.pruning),
        *([] if config.adapter.new_tokens is None else [f"tokens: {_new_tokens(resolved, config.adapter.new_tokens)}"]),
        *([forecast_memory(config, world_size, "cuda", data.train).render()] if config.task == CAUSAL_LM else []),
        *([TimeForecast(steps=num_steps, tokens=resolved.num_tokens, speed=speed).render()] if speed else []),
        "Dry run: nothing was trained, and no weight was read.",
    ]
    return "\n\n".join(parts)


def banner(config: RunConfig, resolved: ResolvedRun, world_size: int) -> str:
    """What is about to be trained, on what, for how long and how large, where.

    Args:
        config: the run's configuration.
        resolved: what the run has resolved of it.
        world_size: number of ranks of the run.
    """
    data, budget = resolved.data, resolved.budget
    steps = resolved.arguments.max_steps
    tokens = resolved.num_tokens // steps
    sources = ", ".join(f"{source.counts.examples:,} of {source.name}" for source in data.train)
    held_out = sum(source.counts.examples for source in data.evaluation)
    lines = {
        "model": f"{config.model.path} ({config.model.quantization}), {len(resolved.initial_ranks)} adapted layers",
        "data": f"{sources}; {f'{held_out:,} held out' if held_out else 'none held out'}",
        "steps": f"{steps:,} of about {tokens:,} tokens, on {world_size} process{'es' * (world_size > 1)}",
        "memory": f"recomputes the activations of {resolved.recomputation} layers in the backward pass",
        "budget": _budget_line(config, budget),
        **({} if config.adapter.new_tokens is None else {"tokens": _new_tokens(resolved, config.adapter.new_tokens)}),
        "folder": config.output_dir,
    }
    return "\n".join(f"{name:<8}{line}" for name, line in lines.items())


def _new_tokens(resolved: ResolvedRun, texts: Sequence[str]) -> str:
    return (
        f"{len(texts)} new ({', '.join(texts)}), whose rows have {resolved.row_parameters:,} trained parameters, "
        "outside of the budget"
    )


def _budget_line(config: RunConfig, budget: Budget) -> str:
    adapter, unit = config.adapter, config.pruning.budget_unit
    scale = f"scale {adapter.scale_of(adapter.start_rank):.2f}"
    if not budget.schedule.prune_steps:
        return f"{budget.initial:,} {unit}, none pruned: {adapter.ranks} ranks, {scale}"
    if config.pruning.rule == MOVE:
        return f"{budget.initial:,} {unit}, moved between layers of {adapter.slots} slots, {scale}"
    if config.pruning.rule == GROW:
        grown = f"{budget.initial:,} {unit} that grow to {budget.final:,}, in layers of {adapter.slots} slots"
        return f"{grown}: like LoRA of rank {adapter.target_rank}, {scale}"
    if config.pruning.rule == MODULES_PER_LAYER:
        return f"{_modules(budget, config.pruning)}, {scale}"
    return f"{budget.initial:,} {unit}, {budget.final:,} in the end: like LoRA of rank {adapter.target_rank}, {scale}"


def _budget(budget: Budget, pruning: PruningConfig) -> str:
    unit = pruning.budget_unit
    if pruning.rule == MOVE:
        steps = [step for step in budget.schedule.prune_steps if not budget.schedule.in_warmup(step)]
        title = f"budget of {budget.initial:,} {unit}, of which {pruning.moved_per_event} components move after steps"
        return (
            title + "\n" + textwrap.fill(", ".join(map(str, steps)), 110, initial_indent="  ", subsequent_indent="  ")
        )
    if pruning.rule == MODULES_PER_LAYER:
        return f"budget of {_modules(budget, pruning)}; plan.json gives them the whole budget, for other runs"
    if not budget.schedule.prune_steps:
        return f"budget of {budget.initial:,} {unit}, of which none is pruned (pruning.rule none)"
    events = [f"{step}: {budget.at(step):,}" for step in budget.schedule.prune_steps]
    does = f"grown after steps (step: {unit} that there are then)"
    if pruning.rule != GROW:
        does = f"pruned after steps (step: {unit} that are kept)"
    title = f"budget of {budget.initial:,} {unit}, {does}"
    return title + "\n" + textwrap.fill(", ".join(events), 110, initial_indent="  ", subsequent_indent="  ")


def _modules(budget: Budget, pruning: PruningConfig) -> str:
    number, step = pruning.modules_per_layer, budget.schedule.final_step
    return f"{budget.initial:,} {pruning.budget_unit}, of which {number} modules of every block stay after step {step}"
