"""What a run adds to the card of its adapter: data, budget, ranks, held-out figures, versions."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_dist.base_model.load import BaseModelSpec, scaled_positions
from dora_dist.config.data import SourceConfig
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import METRICS, TASKS, Metric
from dora_dist.console import files
from dora_dist.console.provenance import NOT_INSTALLED
from dora_dist.console.text import aligned
from dora_dist.runs import records
from dora_dist.runs.summary import rank_table, summarize

LICENCE = (
    "Not chosen. What applies is for whoever publishes the adapter to say, by the licences of its base and of its "
    "data: set `license` above."
)
FOLDER_IN_CARD = "path/to/this/folder"
"""What a card calls the folder that it is in."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card_of(
    run: Path, config: RunConfig, needed: Sequence[tuple[str, str]] = (), method: str | None = None
) -> tuple[dict[str, Any], str]:
    """Metadata and text for :func:`~dora_dist.adapter.card.complete_card`, from the records so far.

    Args:
        run: the run's folder; the run may still be going on.
        config: the configuration that the run has recorded.
        needed: what the base lacks, from :meth:`~dora_dist.runs.adapter_folder.generation.Needed.lines`.
        method: the method that trained the adapter, if it is not the one in the configuration; None if it is.
    """
    about, summary = files.read_json(run / records.RUN), summarize(run)
    settings, versions = about["settings"], about["versions"]
    data: dict[str, Any] = {"license": "unknown", "pipeline_tag": TASKS[config.task].pipeline_tag}
    datasets = sorted({str(source.path) for source in config.data.train_sources if _is_of_the_hub(source)})
    if datasets:
        data["datasets"] = datasets
    kept, parameters = summary["components_kept"], summary["parameters_kept"]
    start = config.adapter.init if config.adapter.start_from is None else f"from {config.adapter.start_from}"
    rope = []
    if (positions := scaled_positions(BaseModelSpec.of(config.model, config.task))) is not None:
        data["rope_parameters"] = positions["rope_parameters"]
        rope = [("first set", how_to_scale(positions))]
    adapter = [
        ("task", config.task),
        ("base", f"{settings['model.path']}, quantization {settings['model.quantization']}"),
        *rope,
        *needed,
        ("steps", f"{summary['steps']} of {settings['optimizer steps']}, {settings['global batch']} rows each"),
        ("learning rate", str(settings["training.learning_rate"])),
        ("seed", str(config.seed)),
        ("preset", f"{config.preset}; start {start}, rule {config.pruning.rule}")
        if method is None
        else ("method", method),
        ("budget", f"as LoRA of rank {config.adapter.target_rank}, counted in {config.pruning.budget_unit}"),
    ]
    if best := summary["best"]:
        adapter.append(("checkpoint", f"of step {best['step']}, the best one by held-out {best['figure']}"))
    if kept is not None:
        state = "" if summary["final_event"] else ", and pruning has not ended"
        size = "" if parameters is None else f" of {parameters:,} parameters"
        adapter.append(("components", f"{summary['components_at_start']} -> {kept}{size}{state}"))
    parts = [
        ("Training", _lines(adapter)),
        ("Data", _lines([("source", "rows", "format"), *map(_source, about["data"]["train"])])),
        ("Held-out figures", _figures(summary, "base" if config.adapter.start_from is None else "start")),
        ("Ranks", "\n".join(rank_table(summary["ranks"])) if summary["ranks"] else ""),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number != NOT_INSTALLED)),
    ]
    sections = [f"## {title}\n\n{textwrap.indent(text, '    ')}" for title, text in parts if text]
    return data, "\n\n".join([*sections, f"## Licence\n\n{LICENCE}"]) + "\n"


def how_to_scale(positions: Mapping[str, Any]) -> str:
    """The settings, in words, that a base needs before an adapter fits it that was trained with ``model.rope_scaling``.
    Without them, the base places tokens elsewhere.

    Args:
        positions: setting -> value, from :func:`~dora_dist.base_model.load.scaled_positions`.
    """
    settings = " and ".join(f"{name} to {json.dumps(value)}" for name, value in positions.items())
    return f"{settings}, in the base's config.json"


def base_card(positions: Mapping[str, Any] | None, needed: Sequence[tuple[str, str]]) -> tuple[dict[str, Any], str]:
    """Like :func:`card_of`, for an adapter whose card says only what its base lacks.

    Args:
        positions: the argument of :func:`how_to_scale`; None if the base needs no such settings.
        needed: what the base lacks, from :meth:`~dora_dist.runs.adapter_folder.generation.Needed.lines`.
    """
    scaling = [] if positions is None else [("first set", how_to_scale(positions))]
    text = textwrap.indent(_lines([*scaling, *needed]), "    ")
    return {} if positions is None else {"rope_parameters": positions["rope_parameters"]}, f"## Base\n\n{text}\n"


def _is_of_the_hub(source: SourceConfig) -> bool:
    path = source.path
    return isinstance(path, str) and HUB_NAME.fullmatch(path) is not None and not Path(path).exists()


def _source(source: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(source["name"]), f"{source['rows']:,}", str(source["format"])


def _figures(summary: Mapping[str, Any], start: str) -> str:
    before, after = summary["before"], summary["after"]
    if not after:
        return ""
    titles = {"loss": Metric("loss"), **METRICS}
    figures = [(metric.title, name, metric.style) for name, metric in titles.items() if name in after]
    rows = [
        (title, f"{before[name]:{style}}" if before and name in before else "-", f"{after[name]:{style}}")
        for title, name, style in figures
    ]
    return _lines([(f"of {after['examples']} examples", start, "adapter"), *rows])


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns. Line breaks in cells become spaces: they would end the block that shows the rows."""
    return aligned([[" ".join(cell.split()) for cell in row] for row in rows], num_words=1 if len(rows[0]) > 2 else 2)
