"""Trains all students of all truths, one cell each, and summarizes them."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dora_dist.adapter.targets import resolve_targets
from dora_dist.base_model.shape import linear_layer
from dora_dist.console.errors import ExpectedRunError
from dora_dist.evaluation.seeds import RateChoice, choose, paired_difference, spread
from dora_dist.planted.options import ORACLE, UNIFORM, Options
from dora_dist.planted.patterns import planted_ranks
from dora_dist.planted.recovery import budget_overlap, idle_share, rank_correlation
from dora_dist.planted.teacher import load_base, plant, sample_rows
from dora_dist.planted.training import Truth, held_out_divergence, train_student

SEARCH, REPORTED = "search", "reported"


class DivergedError(ExpectedRunError):
    """The loss of a student is not finite."""


def run_cells(options: Options, result: dict[str, Any], keep: Callable[[], None], tell: Callable[[str], None]) -> None:
    """Train the students that are missing in the result, and add a cell for each.

    On the first ``search_seeds`` seeds, every method is trained at every learning rate. On the others it is trained at
    the rate with the lowest divergence on the search split.

    Args:
        options: settings of the experiment.
        result: ``layers``, ``truths`` and ``cells``; changed in place.
        keep: function that is called after every cell.
        tell: function that takes a line of progress.

    Raises:
        DivergedError: a student's loss is not a number.
        ValueError: the planted ranks do not fit the base.
    """
    for seed in range(options.seeds):
        # The rates for later seeds are chosen by the cells of earlier ones.
        missing = missing_students(options, result, seed)
        if not missing:
            continue
        base, rows = make_material(options, seed)
        for pattern, students in missing.items():
            truth = make_truth(options, pattern, seed, base, rows, result)
            for method, rate in students:
                cell = run_cell(options, pattern, truth, method, rate, list(result["layers"]))
                result["cells"].append(cell)
                keep()
                tell(
                    f"{pattern}, seed {seed}, {method} at {rate:g}: divergence {cell['divergence'][REPORTED]:.4f}, "
                    f"{cell['seconds']:.0f} s"
                )


def missing_students(options: Options, result: Mapping[str, Any], seed: int) -> dict[str, list[tuple[str, float]]]:
    """Pattern -> (method, learning rate) of every student that is missing in the result for this seed.

    Patterns without missing students are not included. Seeds after the search seeds need the cells of those.
    """
    missing: dict[str, list[tuple[str, float]]] = {}
    for pattern, method in itertools.product(options.patterns, options.methods):
        rates = options.learning_rates
        if seed >= options.search_seeds:
            rates = (choice_of(result, pattern, method, options).learning_rate,)
        for rate in rates:
            if not _has(result, pattern, method, rate, seed):
                missing.setdefault(pattern, []).append((method, rate))
    return missing


def run_cell(
    options: Options, pattern: str, truth: Truth, method: str, learning_rate: float, layers: Sequence[str]
) -> dict[str, Any]:
    """Train a student and describe the result; figures by layer are lists in the order of ``layers``.

    Raises:
        DivergedError: the student's loss is not a number.
    """
    outcome = train_student(truth, method, learning_rate, options)
    if not all(map(math.isfinite, outcome["divergence"].values())):
        raise DivergedError(
            f"{pattern}, {method}, seed {truth.seed}: not finite at learning rate {learning_rate:g}, lower it"
        )
    return {
        "pattern": pattern,
        "method": method,
        "learning_rate": learning_rate,
        "seed": truth.seed,
        **outcome,
        "kept": [outcome["kept"][name] for name in layers],
        "at_final_event": {
            what: [values[name] for name in layers] for what, values in outcome["at_final_event"].items()
        },
    }


def make_material(options: Options, seed: int) -> tuple[PreTrainedModel, Tensor]:
    """Material that all truths of a seed share: the base, and text of shape ``(rows, length)``."""
    base = load_base(options.model, seed)
    return base, sample_rows(base, 2 * options.held_out + options.steps * options.batch, options.length, seed)


def make_truth(
    options: Options, pattern: str, seed: int, base: PreTrainedModel, rows: Tensor, result: dict[str, Any]
) -> Truth:
    """Plant a teacher, and describe it in ``result["truths"]``."""
    names = resolve_targets(base, "all-linear")
    result.setdefault("layers", {name: sum(linear_layer(base, name).weight.shape) for name in names})
    ranks = planted_ranks(pattern, names, options.target_rank, seed, options.kind)
    teacher, norms = plant(base, ranks, options.strength, options.decay, seed)
    search, reported, train = rows.split([options.held_out, options.held_out, options.steps * options.batch])
    described: dict[str, Any] = {
        "pattern": pattern,
        "seed": seed,
        "planted": [ranks[name] for name in names],
        "update_norm": [norms[name] for name in names],
        "base_divergence": held_out_divergence(teacher, base, reported),
        "initial_rank": initial_rank(ranks, options.target_rank),
    }
    others = [truth for truth in result["truths"] if (truth["pattern"], truth["seed"]) != (pattern, seed)]
    result["truths"] = [*others, described]
    return Truth(
        base=base,
        teacher=teacher,
        planted=ranks,
        initial_rank=described["initial_rank"],
        train=train,
        held_out={SEARCH: search, REPORTED: reported},
        seed=seed,
    )


def initial_rank(planted: Mapping[str, int], target_rank: int) -> int:
    """Twice the target, or the highest planted rank if that is more: a truth out of reach would show nothing."""
    return max(2 * target_rank, *planted.values())


def choice_of(result: Mapping[str, Any], pattern: str, method: str, options: Options) -> RateChoice:
    """The rate of the grid with the lowest mean divergence on the search split of the search seeds."""
    figures: dict[float, list[float]] = {rate: [] for rate in options.learning_rates}
    for cell in result["cells"]:
        searched = cell["seed"] < options.search_seeds and cell["learning_rate"] in figures
        if searched and (cell["pattern"], cell["method"]) == (pattern, method):
            figures[cell["learning_rate"]].append(cell["divergence"][SEARCH])
    assert all(len(values) == options.search_seeds for values in figures.values()), (pattern, method, figures)
    choice = choose(figures, lower_is_better=True)
    assert choice is not None, "a student that diverges ends the experiment"
    return choice


def chosen_cells(result: Mapping[str, Any], pattern: str, method: str, options: Options) -> list[Mapping[str, Any]]:
    """Cells of a method at its chosen rate, in the order of the seeds."""
    rate = choice_of(result, pattern, method, options).learning_rate
    cells = [
        cell
        for cell in result["cells"]
        if (cell["pattern"], cell["method"], cell["learning_rate"]) == (pattern, method, rate)
        and cell["seed"] < options.seeds
    ]
    return sorted(cells, key=lambda cell: cell["seed"])


def summarize(options: Options, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of figures for every pattern and method, at the chosen rates, on the reported split."""
    rows = []
    for pattern in options.patterns:
        truths = {truth["seed"]: truth for truth in result["truths"] if truth["pattern"] == pattern}
        chosen = {method: chosen_cells(result, pattern, method, options) for method in options.methods}
        uniform = _divergences(chosen[UNIFORM])
        for method, cells in chosen.items():
            divergences = _divergences(cells)
            row = {
                "pattern": pattern,
                "method": method,
                "learning_rate": cells[0]["learning_rate"],
                "rate_at_edge": choice_of(result, pattern, method, options).at_edge is not None,
                "divergence": asdict(spread(divergences)),
                "to_uniform": None if method == UNIFORM else asdict(paired_difference(divergences, uniform)),
                **_recovery(cells, truths, result["layers"]),
            }
            if ORACLE in chosen:
                oracle = _divergences(chosen[ORACLE])
                gap = sum(uniform) - sum(oracle)
                row["share_of_oracle_gain"] = (sum(uniform) - sum(divergences)) / gap if gap > 0 else None
            rows.append(row)
    return rows


def _recovery(
    cells: Sequence[Mapping[str, Any]], truths: Mapping[int, Mapping[str, Any]], layers: Mapping[str, int]
) -> dict[str, Any]:
    correlations, overlaps, idle, parameters = [], [], [], []
    seen: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        planted = dict(zip(layers, truths[cell["seed"]]["planted"], strict=True))
        kept = dict(zip(layers, cell["kept"], strict=True))
        correlations.append(rank_correlation(kept, planted))
        overlaps.append(budget_overlap(kept, planted))
        idle.append(idle_share(kept, planted))
        parameters.append(sum(rank * layers[name] for name, rank in kept.items()))
        for what, values in cell["at_final_event"].items():
            groups = seen.setdefault(what, {"idle": [], "planted": []})
            for value, rank in zip(values, planted.values(), strict=True):
                groups["planted" if rank else "idle"].append(value)
    known = [value for value in correlations if value is not None]
    return {
        "correlation": asdict(spread(known)) if len(known) == len(cells) else None,
        "overlap": asdict(spread(overlaps)),
        "idle_share": asdict(spread(idle)),
        "parameters": asdict(spread(parameters)),
        "at_final_event": {
            what: {group: asdict(spread(values)) for group, values in groups.items() if values}
            for what, groups in seen.items()
        },
    }


def _divergences(cells: Sequence[Mapping[str, Any]]) -> list[float]:
    return [cell["divergence"][REPORTED] for cell in cells]


def _has(result: Mapping[str, Any], pattern: str, method: str, rate: float, seed: int) -> bool:
    key = (pattern, method, rate, seed)
    return any((c["pattern"], c["method"], c["learning_rate"], c["seed"]) == key for c in result["cells"])
