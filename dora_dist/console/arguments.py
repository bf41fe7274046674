"""What several commands have on their command lines."""

import argparse
import math
import sys
from collections.abc import Sequence

CONFIG_HELP = "YAML file of the run; it can also be given as the first argument; see dora-dist recipe"
SPEED_OPTION = "--tokens-per-second"


def with_config_option(arguments: Sequence[str] | None) -> list[str]:
    """The arguments of a command with ``--config FILE``, where the file may also be the first argument, by itself.

    Args:
        arguments: as given to the command; None for ``sys.argv``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    as_first = bool(arguments) and not arguments[0].startswith("-")
    return ["--config", *arguments] if as_first else list(arguments)


def add_speed_option(parser: argparse.ArgumentParser) -> None:
    """Let a command take the speed of a run, by which it estimates the time; :func:`speed_of` reads it."""
    parser.add_argument(
        SPEED_OPTION,
        type=float,
        metavar="N",
        help="of all ranks together, to estimate the time by; by default what the folder of the run shows, if anything",
    )


def speed_of(options: argparse.Namespace) -> float | None:
    """Tokens per second, where they are given.

    Raises:
        ValueError: they are 0, less, or not finite.
    """
    speed: float | None = options.tokens_per_second
    if speed is not None and not 0 < speed < math.inf:
        raise ValueError(f"{SPEED_OPTION} is {speed:g}, but must be above 0, and finite")
    return speed
