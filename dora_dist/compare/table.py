"""Formats the table of a comparison: ``results.md``."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dora_dist.compare.results import ComparisonResults, Figure, GroupResult
from dora_dist.console.files import write_text

TABLE = "results.md"


def write_table(results: ComparisonResults, path: Path) -> None:
    """Write the results as Markdown, atomically."""
    write_text(path, format_table(results))


def format_table(results: ComparisonResults) -> str:
    """The results as Markdown."""
    parts = ["# Comparison", ""]
    for groups in results.by_task_and_budget():
        parts += [*_table(results, groups), ""]
        if groups[0].parts:
            parts += [*_table_of_parts(results, groups), ""]
    parts += [f"- **{name}**: {says}" for name, says in results.methods.items()]
    parts += ["", *(f"- {note}" for note in _remarks(results)), ""]
    missing = [line for group in results.groups for line in group.missing]
    if missing:
        parts += ["## Missing", "", *(f"- {' '.join(line.split())}" for line in missing), ""]
    return "\n".join(parts)


def _table(results: ComparisonResults, groups: Sequence[GroupResult]) -> list[str]:
    first, baseline = groups[0], results.config.baseline
    sense = "lower" if first.lower_is_better else "higher"
    head = [
        "method",
        "learning rate",
        f"{first.metric}, mean ± sd",
        "seeds",
        f"minus {baseline} [{results.confidence:.0%} CI]",
        "p (Holm)",
        "parameters",
        "training s",
    ]
    lines = [f"## {first.task}, rank {first.budget} ({first.metric}, {sense} is better)", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_row(group, len(results.config.seeds))) + " |" for group in groups]


def _table_of_parts(results: ComparisonResults, groups: Sequence[GroupResult]) -> list[str]:
    """The figure on every part of the task, with the difference from the baseline."""
    names = list(groups[0].parts)
    lines = [f"{groups[0].metric} by part, mean ± sd, and minus {results.config.baseline}:", ""]
    lines += ["| method | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for group in groups:
        cells = [" ".join(filter(None, (_mean_cell(part), _interval(part)))) for part in group.parts.values()]
        lines += ["| " + " | ".join([group.method, *cells]) + " |"]
    return lines


def _row(group: GroupResult, seeds: int) -> list[str]:
    rate = group.learning_rate
    edge = f" **({group.at_edge} of the grid!)**" if group.at_edge else ""
    number = len(group.reported)
    return [
        group.method,
        "missing" if rate is None else f"{rate:g}{edge}",
        _mean_cell(group),
        str(number) if number == seeds else f"**{number} of {seeds}**",
        _interval(group),
        _p_value(group),
        _parameters(group),
        "" if group.seconds is None else f"{group.seconds:.0f}",
    ]


def _parameters(group: GroupResult) -> str:
    if group.parameters is None or group.stored is None:
        return ""
    of = f" of {group.stored:,.0f}" if group.stored != group.parameters else ""
    return f"{group.parameters:,.0f}{of}{' †' * group.parameters_differ}"


def _mean_cell(figure: Figure) -> str:
    if figure.mean is None:
        return "missing"
    sd = "n/a" if figure.deviation is None else f"{figure.deviation:.4f}"
    return f"{figure.mean:.4f} ± {sd}"


def _interval(figure: Figure) -> str:
    """The difference from the baseline with its interval; empty for the baseline."""
    difference = figure.difference
    if difference is None:
        return ""
    if difference.mean is None:
        return "n/a"
    if difference.low is None:
        return f"{difference.mean:+.4f} [n/a]"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _p_value(group: GroupResult) -> str:
    """The difference's p-value with the adjusted one; empty for the baseline."""
    if group.difference is None:
        return ""
    return "n/a" if group.difference.p_value is None else f"{group.difference.p_value:.3g} ({group.p_holm:.3g})"


def _remarks(results: ComparisonResults) -> Iterator[str]:
    config, groups = results.config, results.groups
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    if len(config.learning_rates) > 1:
        yield (
            f"The learning rate of every method was chosen from {rates} by the mean over {config.search_seeds} of "
            "the seeds on the split `search`, which is not the reported one. Figures are from the last step."
        )
    else:
        yield f"The learning rate was not searched: it is {rates} for all methods. Figures are from the last step."
    yield (
        f"Differences are paired by seed, with Student's intervals; p-values are from the paired t test. "
        f"{results.comparisons} comparisons were made: the p-values in brackets are adjusted for that (Holm), the "
        "intervals are not."
    )
    yield (
        f"Parameters are the elements of the saved LoRA factors; gates and singular values are folded in. All adapters "
        f"are scaled by alpha / initial rank = {config.alpha_over_rank:g}."
    )
    if any(group.parts for group in groups):
        yield "A task's parts are shown beside the compared figure: no rate is chosen on them, and no p-value adjusted."
    if any(group.stored != group.parameters for group in groups):
        yield (
            "For an adapter with prompt routing, parameters are those that a prompt uses if all modules of a block are "
            "chosen equally often; routers are not counted."
        )
    if any(group.parameters_differ for group in groups):
        yield f"† differs from {config.baseline} by more than one component of the widest layer."
    for group in groups:
        if group.at_edge:
            yield (
                f"**{group.task}, rank {group.budget}, {group.method}: the learning rate chosen is the "
                f"{group.at_edge} of the grid. A better one may lie beyond it: widen learning_rates.**"
            )
    yield from results.notes
    if len(results.commits) > 1:
        yield f"Cells were run at several commits: {', '.join(results.commits)}."
