"""Check a machine or a job before training, and report what is wrong with it.

Alone, it checks this machine. Started with the launcher of dora_dist.train (accelerate launch, torchrun, or tasks of
Slurm), it checks every rank, and what the ranks share: the network and the checkpoint folder. It leaves no files
behind. Every key of a configuration can be overridden as --section.key value. Exit status: 0 no problem found, 1
problems found, 2 the command line is invalid.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dora_dist.config.command_line import with_config_option
from dora_dist.console.arguments import CONFIG_HELP
from dora_dist.console.command import capture, run_command
from dora_dist.console.errors import ExpectedRunError
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.text import is_first_rank, say
from dora_dist.distributed.launcher import launched

if TYPE_CHECKING:
    from dora_dist.config.run import RunConfig
    from dora_dist.distributed.agreement import Agreement
    from dora_dist.doctor.facts import Problem, RankFacts

TIMEOUT_SECONDS = 120.0


def build_parser() -> argparse.ArgumentParser:
    """The command's own options, without the overrides."""
    parser = argparse.ArgumentParser(
        prog="dora-dist doctor",
        usage="%(prog)s [CONFIG [--section.key value ...]] [--output DIR] [--timeout SECONDS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for checkpoints; by default output_dir of the configuration"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"how long ranks wait for each other ({TIMEOUT_SECONDS:g})",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, and exit with its status.

    Raises:
        ValueError: the command line is invalid.
        ExpectedRunError: the ranks did not connect, or one of them failed.
    """
    options, overrides = build_parser().parse_known_args(with_config_option(arguments))
    if overrides and options.config is None:
        raise ValueError(f"{overrides[0]} is no option of the doctor, and keys of a run need --config")
    if options.timeout <= 0:
        raise ValueError(f"--timeout is {options.timeout:g}, but must be positive")
    # c10d logs a failed rendezvous as a C++ stack; the exception that it raises says the same in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # Schedulers and launchers end a job with SIGTERM; temporary files must be removed then too.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # because libraries print to standard output
            quiet_libraries()
            config = capture(read_config, options.config, overrides)
            problems = inspect_job(config.result, options.output, options.timeout)
    except ImportError as error:
        raise ExpectedRunError(
            f"{error}: activate the environment of this project, or pip install -c launch/constraints.txt -e ."
        ) from None
    if problems:
        # Like run_command, but without the interpreter's shutdown, which may wait for other ranks.
        sys.stderr.flush()
        os._exit(1)


def read_config(path: Path | None, overrides: Sequence[str]) -> "RunConfig | None":
    """The configuration of the run to prepare for, if there is one."""
    # Imported here, so that an incomplete environment is reported without a traceback.
    from dora_dist.config.parse import load_config

    return load_config(path, overrides) if path else None


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def inspect_job(config_of: "Callable[[], RunConfig | None]", output: Path | None, timeout: float) -> "list[Problem]":
    """Inspect this machine or job, and print each section of the report as soon as it is known.

    Args:
        config_of: function that returns the configuration, or raises if it is invalid.
        output: folder to check instead of the configuration's output_dir.
        timeout: longest time in seconds that ranks wait for each other.
    """
    # Heavy imports come after the checks of the command line.
    from dora_dist.doctor import report
    from dora_dist.doctor.device_findings import device_problems
    from dora_dist.doctor.findings import node_problems, software_problems, world_problems
    from dora_dist.doctor.inspection import inspect_rank, join
    from dora_dist.doctor.network import measure_network
    from dora_dist.doctor.shared_findings import network_problems

    say("waiting for all ranks ..." if launched(os.environ) else "checking this machine ...")
    environment = dict(os.environ)
    agreement = join(timeout)
    with agreement.together("reading the configuration"):
        config = config_of()
    ranks = inspect_rank(agreement, config, environment)
    tell(report.software_section(ranks))
    tell(report.nodes_section(ranks))
    tell(report.environment_section(ranks))
    tell(report.devices_section(ranks))
    problems = [
        *world_problems(ranks),
        *software_problems(ranks),
        *device_problems(ranks, config.model.compute_dtype if config else "auto"),
        *node_problems(ranks),
        *inspect_folder(agreement, ranks, config, output),
    ]
    say("timing all-reduces ...")
    network = measure_network(agreement)
    tell(report.network_section(network, len(ranks)))
    problems += network_problems(network, ranks)
    tell(report.problems_section(problems))
    agreement.close()
    return problems


def inspect_folder(
    agreement: "Agreement", ranks: "Sequence[RankFacts]", config: "RunConfig | None", output: Path | None
) -> "list[Problem]":
    """Test the checkpoint folder on all ranks and print the result; see :func:`inspect_job`."""
    from dora_dist.doctor import report
    from dora_dist.doctor.grouping import by_node
    from dora_dist.doctor.inspection import checkpoint_bytes
    from dora_dist.doctor.shared_findings import storage_problems
    from dora_dist.doctor.storage import check_storage

    folder = output or (Path(config.output_dir) if config else None)
    if folder is None:
        tell(report.section("Checkpoint folder", ["not checked: give a configuration, or --output DIR"]))
        return []
    say(f"writing and reading in {folder} ...")
    node = ranks[agreement.rank].node
    measures = by_node(ranks)[node][0].rank == agreement.rank
    storage = check_storage(folder.expanduser().absolute(), node, agreement, measures)
    checkpoint = checkpoint_bytes(config) if config else None
    tell(report.storage_section(storage, folder, checkpoint))
    needed = checkpoint * (config.checkpoint.keep_last + 1) if config and checkpoint else None
    return storage_problems(storage, ranks, folder, needed)


def tell(text: str) -> None:
    """Print a section, from the first rank only."""
    if is_first_rank():
        print(text, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    run_command(main)
