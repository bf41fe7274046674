"""Command-line options that several commands share."""

import argparse
import math
from pathlib import Path

CONFIG_HELP = "YAML file of the run; it can also be given as the first argument; see dora-dist recipe"
SPEED_OPTION = "--tokens-per-second"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a command's adapter and its base."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run (output_dir of its configuration), or of an adapter"
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="such as checkpoint-120, instead of the final adapter")
    parser.add_argument(
        "--model.path", dest="base_path", metavar="PATH", help="the base, where it is not where the run or adapter says"
    )
    parser.add_argument(
        "--model.quantization",
        dest="base_quantization",
        metavar="NAME",
        help="of the base in training, for an adapter whose folder does not say it: nf4, int8 or none",
    )


def add_speed_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the speed of a run, from which the time is estimated; :func:`speed_of` reads it."""
    parser.add_argument(
        SPEED_OPTION,
        type=float,
        metavar="N",
        help="speed of all ranks together, for the estimate of time; by default that of the run in output_dir, if any",
    )


def speed_of(options: argparse.Namespace) -> float | None:
    """The given tokens per second, or None.

    Raises:
        ValueError: the number is not positive or not finite.
    """
    speed: float | None = options.tokens_per_second
    if speed is not None and not 0 < speed < math.inf:
        raise ValueError(f"{SPEED_OPTION} is {speed:g}, but must be above 0, and finite")
    return speed
