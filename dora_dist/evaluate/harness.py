"""lm-eval-harness on one model, with its adapter switched off and on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from dora_dist.config.checks import nearest
from dora_dist.runs.task_figures import TaskFigure, paired_error

PACKAGE = "lm_eval"
ERROR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """How the tasks are asked.

    Attributes:
        limit: number of examples of each task, the first ones; None for all.
        batch_size: number of requests at a time.
        chat: whether what is asked goes into the chat template.
        system: system message in the chat template; None for none.
    """

    limit: int | None
    batch_size: int
    chat: bool
    system: str | None


def check_installed() -> None:
    """Refuse to go on without lm-eval-harness.

    Raises:
        ValueError: it is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise ValueError(
            'evaluate needs the package lm-eval, which is not installed: pip install "dora-dist[evaluate]"'
        )


def find_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    """The harness's index of tasks, all of ``names`` among them, with their data.

    Thousands of files describe the harness's own tasks: they are read only where a name is not among the user's.

    Args:
        names: names of tasks, groups and tags.
        include_path: folder of the user's own tasks; None for none.

    Raises:
        ValueError: there is no such task, or its data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        own = manager.all_tasks
        manager = TaskManager(include_path=include_path)
        for name in names:
            if name not in manager.all_tasks:
                where = f"; {include_path} has {', '.join(own) or 'none'}" if include_path else ""
                advice = where or "; tasks of your own need --include-path FOLDER"
                raise ValueError(
                    f"--tasks has {name!r}, which lm-eval does not know{nearest(name, manager.all_tasks)}{advice}"
                )
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # errors of several libraries, and of the network below them
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"--tasks has {name!r}, which cannot be loaded: {reason}") from None
    return manager


def evaluate_twice(
    model: Any, tokenizer: Any, names: Sequence[str], manager: Any, options: HarnessOptions
) -> list[TaskFigure]:
    """All figures of the base and of the adapter, over the same examples, from one model in memory.

    Args:
        model: PEFT's model, with the adapter.
        tokenizer: the adapter's tokenizer.
        names: names of tasks, groups and tags.
        manager: result of :func:`find_tasks`.
        options: how they are asked.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)

    def run() -> Mapping[str, Any]:
        # The harness seeds its own choices, such as the examples that are shown, alike in every call.
        result: Mapping[str, Any] = simple_evaluate(
            harness,
            tasks=list(names),
            task_manager=manager,
            limit=options.limit,
            apply_chat_template=options.chat,
            system_instruction=options.system,
        )
        return result

    with model.disable_adapter():
        base = run()
    return figures_of(base, run())


def figures_of(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[TaskFigure]:
    """Figures side by side, from two results of ``simple_evaluate`` on the same tasks."""
    found = []
    for task, entries in base["results"].items():
        for key, value in entries.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith(ERROR) or not isinstance(value, int | float):
                continue
            other = adapter["results"][task][key]
            errors = [_number(result["results"][task].get(f"{metric}{ERROR},{chosen}")) for result in (base, adapter)]
            samples = _examples(base, task, metric, chosen), _examples(adapter, task, metric, chosen)
            found.append(
                TaskFigure(
                    task=task,
                    metric=metric if chosen == "none" else f"{metric}:{chosen}",
                    examples=base["n-samples"].get(task, {}).get("effective"),
                    base=float(value),
                    adapter=float(other),
                    base_error=errors[0],
                    adapter_error=errors[1],
                    difference_error=paired_error(*samples, float(value), float(other)),
                )
            )
    return found


def _number(value: Any) -> float | None:
    """A standard error; None where there is none, for which the harness has ``N/A``."""
    return float(value) if isinstance(value, int | float) else None


def _examples(result: Mapping[str, Any], task: str, metric: str, chosen: str) -> dict[int, float]:
    """Number of an example -> its figure, without figures that are no numbers."""
    samples = (result.get("samples") or {}).get(task, [])
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in samples
        if sample.get("filter", "none") == chosen and isinstance(sample.get(metric), Real)
    }
