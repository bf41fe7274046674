"""Measure base and adapter of a run on tasks of lm-eval-harness, side by side.

The base is loaded once; its adapter is switched off and on. The figures are printed, and appended to evaluations.jsonl
in the run's folder with what they were made with; those of the final adapter are added to its card. Of an adapter
without a run, they are printed, and written where --output says.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dora_dist.config.checks import require
from dora_dist.console.arguments import add_run_options
from dora_dist.console.command import run_command
from dora_dist.console.files import write_json
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.console.text import say

BATCH_SIZE = 8
SECTION = "Tasks"
"""Title of the card's section."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="tasks, groups or tags of lm-eval")
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with tasks of your own (YAML)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first examples of each task, this many")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"requests at a time; by default {BATCH_SIZE}"
    )
    parser.add_argument("--chat", action="store_true", help="put what is asked into the run's chat template")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record.

    Raises:
        ValueError: the configuration or the input is invalid.
    """
    quiet_libraries()
    options = build_parser().parse_args(arguments)
    names = _check(options)
    from dora_dist.console.provenance import EVALUATE_PACKAGES, environment
    from dora_dist.evaluate.harness import HarnessOptions, check_installed, evaluate_twice, find_tasks
    from dora_dist.routing.files import is_routed
    from dora_dist.routing.loading import load_trained
    from dora_dist.runs.task_figures import digest_of, line_of, record_line, table_of
    from dora_dist.runs.trained_run import FINAL, open_asked

    check_installed()
    trained = open_asked(options)
    if is_routed(trained.adapter):
        raise ValueError(
            f"the adapter of {trained.adapter} is routed by prompt, but lm-eval gives prompt and answer to the model "
            "as one text, by all of which it would be routed: ask it with dora-dist generate"
        )
    tokenizer = trained.load_tokenizer()
    if options.chat and not tokenizer.chat_template:
        raise ValueError("--chat is given, but the tokenizer of this run has no chat template: leave it out")
    if trained.use.chat and not options.chat:
        say("this run was trained in a chat template, which --chat puts around what is asked")
    systems = trained.use.systems
    system = systems[0] if options.chat and len(systems) == 1 and systems[0] else None
    asked = HarnessOptions(limit=options.limit, batch_size=options.batch_size, chat=options.chat, system=system)
    with Phases("reading the tasks"):
        manager = find_tasks(names, options.include_path)
    model = load_trained(trained)
    about = {
        "tasks": names,
        **{name: getattr(options, name) for name in ("limit", "batch_size", "chat")},
        "system": system,
        "include_path": None if options.include_path is None else str(options.include_path),
        "adapter_sha256": digest_of(trained.adapter),
        "environment": environment(EVALUATE_PACKAGES),
    }
    figures = evaluate_twice(model, tokenizer, names, manager, asked)
    line = line_of(trained.adapter.name, figures, about)
    if options.output is not None:
        write_json(options.output, line)
    if trained.run is not None:
        record_line(trained.run, line)
        if trained.adapter.name == FINAL:
            _add_to_card(trained.run)
    print(table_of(figures))


def _check(options: argparse.Namespace) -> list[str]:
    """Names of the tasks, each once.

    Raises:
        ValueError: an option is out of its range.
    """
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "be at least 1")
    folder = options.include_path
    require(folder is None or folder.is_dir(), "--include-path", folder, "be a folder with tasks as YAML files")
    file = options.output
    require(file is None or file.parent.is_dir(), "--output", file, "lie in a folder that is there")
    require(file is None or not file.is_dir(), "--output", file, "be a file, and not a folder")
    named = [name for entry in options.tasks for name in entry.split(",") if name]
    require(bool(named), "--tasks", options.tasks, "name a task")
    return list(dict.fromkeys(named))


def _add_to_card(run: Path) -> None:
    """Write the latest figures of all tasks as the last section of the final adapter's card."""
    from dora_dist.adapter.card import CARD, set_last_section
    from dora_dist.runs.task_figures import latest_figures, table_of

    if (run / "adapter" / CARD).is_file():
        set_last_section(run / "adapter", SECTION, table_of(latest_figures(run)))


if __name__ == "__main__":
    run_command(main)
