"""The command: runs the missing cells, and writes table, pictures and results."""

import argparse
import os
import shlex
from collections.abc import Sequence

from dora_dist.compare.launching import WORKER, become_worker, leave_launcher, run_workers, visible_gpus
from dora_dist.compare.plan import Plan
from dora_dist.compare.settings import parse_compare
from dora_dist.config.command_line import with_config_option
from dora_dist.console.command import run_command
from dora_dist.console.errors import PREEMPTED, ExpectedRunError, PreemptedError
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.text import is_first_rank
from dora_dist.distributed.launcher import launched

DESCRIPTION = """Run methods x seeds x tasks as CONFIG says, and compare. Finished cells are skipped and interrupted
ones resumed: the same command continues a comparison. Any number of workers may share the work; they may start later,
on other nodes, or by accelerate launch, where every rank is a worker. Keys of CONFIG can be overridden as
--key value."""


REPORTING = "DORA_DIST_COMPARE_REPORTS"
"""Option for a worker that was a launcher's first rank: it writes the results."""


class CellsMissingError(ExpectedRunError):
    """Some cells of a comparison failed. The table holds the others."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        ValueError: the configuration or an option is invalid.
        CellsMissingError: a cell failed.
        PreemptedError: a worker received a signal to stop.
    """
    parser = argparse.ArgumentParser(
        prog="dora-dist compare",
        usage="%(prog)s CONFIG [--key value ...] [--workers N] [--dry-run] [--report]",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="CONFIG",
        help="YAML file of the comparison; it can also be given as the first argument; recipes are under compare/",
    )
    parser.add_argument("--workers", type=int, help="number of processes on this machine; by default one per GPU, or 1")
    parser.add_argument("--dry-run", action="store_true", help="only print the cells")
    parser.add_argument("--report", action="store_true", help="only write table and pictures from the finished cells")
    parser.add_argument(WORKER, dest="worker_of", type=int, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args(with_config_option(arguments))
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers is {options.workers}, but must be at least 1")
    quiet_libraries()
    plan = Plan(parse_compare(["--config", options.config, *overrides]))
    own = [options.config, *overrides]
    if options.dry_run:
        print(describe(plan))
    elif options.report:
        finish(plan, own)
    elif options.worker_of is not None:
        _work(plan, options.worker_of)
        if os.environ.get(REPORTING) == "true":
            finish(plan, own)
    elif launched(os.environ):
        os.environ[REPORTING] = str(is_first_rank()).lower()
        become_worker(own)
    else:
        _run(plan, own, options.workers)


def _work(plan: Plan, workers: int) -> None:
    from dora_dist.compare.data import prepare
    from dora_dist.compare.worker import Worker

    Worker(plan, prepare(plan), workers).work()


def _run(plan: Plan, own: Sequence[str], workers: int | None) -> None:
    gpus = visible_gpus(os.environ)
    workers = workers or max(1, len(gpus))
    print(f"{plan.num_cells} cells by {workers} worker{'s' * (workers > 1)} into {plan.folder}", flush=True)
    if workers == 1 and len(gpus) < 2:
        leave_launcher()
        _work(plan, 1)
    else:
        from dora_dist.compare.data import prepare

        prepare(plan)  # once, before all workers read it, so that an error is reported once
        status = run_workers(own, workers, gpus)
        if status == PREEMPTED:
            raise PreemptedError("preempted; start the same command again to resume")
    finish(plan, own)


def finish(plan: Plan, own: Sequence[str]) -> None:
    """Write results and pictures, and print the table.

    Raises:
        CellsMissingError: the results are incomplete.
    """
    from dora_dist.compare import pictures, results, table
    from dora_dist.compare.data import check_recorded

    notes = check_recorded(plan)
    found = results.gather(plan, notes, shlex.join(["python", "-m", "dora_dist.compare", *own]))
    results.write_results(found, plan.folder / results.RESULTS)
    written = plan.folder / table.TABLE
    table.write_table(found, written)
    pictures.draw_comparison(found, plan.folder / pictures.COMPARISON)
    pictures.draw_rank_maps(found, plan.folder / pictures.RANKS)
    print(f"\n{written.read_text(encoding='utf-8')}\n{written}", flush=True)
    if not found.complete:
        rows = sum(bool(group.missing) for group in found.groups)
        raise CellsMissingError(
            f"{rows} of {len(found.groups)} table rows are incomplete, see the end of {written}; start the same "
            "command to run the missing cells"
        )


def describe(plan: Plan) -> str:
    """The number of cells and rows, in words."""
    config = plan.config
    rates, groups = len(config.learning_rates), len(plan.groups)
    searched = groups * rates * config.search_seeds
    lines = [
        f"{groups} rows of the table: {len(config.tasks)} tasks x {len(config.budgets)} budgets x "
        f"{len(plan.methods)} methods",
        f"{plan.num_cells} cells: {searched} to choose learning rates ({rates} rates x {config.search_seeds} seeds a "
        f"row), {plan.num_cells - searched} more at the chosen ones (the other seeds)",
        "",
        *(str(cell) for group in plan.groups for cell in plan.search_cells(group)),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
