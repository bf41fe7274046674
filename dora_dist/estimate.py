"""Estimate the memory of a run on every GPU, by part, its tokens per step, and its time where a speed is known.

No weight is read: a folder with the config.json of a model is enough for model.path. With the model's tokenizer there,
the lengths of rows come from the data, which are encoded once and kept in data.cache_dir. recompute_layers: auto counts
as all layers on a machine without a GPU. The time needs a speed: that of a run in output_dir, or --tokens-per-second.
Every key of the configuration can be overridden as --section.key value, as for dora-dist train.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.config.command_line import with_config_option
from dora_dist.config.parse import load_config
from dora_dist.config.run import RunConfig
from dora_dist.console.arguments import CONFIG_HELP, SPEED_OPTION, add_speed_option, speed_of
from dora_dist.console.command import run_command
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.distributed.launcher import world_size_of

if TYPE_CHECKING:
    from dora_dist.data.prepared import PreparedSource
    from dora_dist.setup.forecast import MemoryForecast, TimeForecast

WITHOUT_DATA = "--without-data"


def as_json(memory: "MemoryForecast", time: "TimeForecast | None") -> str:
    """All numbers in bytes, tokens and seconds, with totals, as JSON."""
    estimate, typical = memory.most, memory.typical
    figures: dict[str, Any] = dataclasses.asdict(estimate)
    for name in ("configured", "recomputing_none", "recomputing_all"):
        peak = getattr(estimate, name).peak
        figures[name]["peak"] = {"instant": peak.name, "bytes": peak.total}
    figures["peak_bytes"] = estimate.peak_bytes
    figures["tokens_per_micro_batch"] = estimate.tokens_per_micro_batch
    figures["tokens_per_step"] = estimate.tokens_per_step
    figures["rows_are"] = memory.rows
    figures["typical"] = typical and {"length": typical.length, "peak_bytes": typical.peak_bytes}
    figures["time"] = time and {**dataclasses.asdict(time), "seconds": time.seconds}
    return json.dumps(figures, indent=2)


def build_parser() -> argparse.ArgumentParser:
    """The command line, without the overrides."""
    parser = argparse.ArgumentParser(
        prog="dora-dist estimate",
        usage="%(prog)s CONFIG [--section.key value ...] [--world-size N] [--device cuda|cpu] "
        f"[{WITHOUT_DATA}] [{SPEED_OPTION} N] [--json]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="number of GPUs; by default WORLD_SIZE of the environment, or 1"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device of the run (default: cuda)")
    parser.add_argument(
        WITHOUT_DATA,
        action="store_true",
        help="do not read the data: assume rows of data.max_length, and estimate no time",
    )
    add_speed_option(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the estimate.

    Raises:
        ValueError: the configuration or an option is invalid.
    """
    quiet_libraries()
    options, overrides = build_parser().parse_known_args(with_config_option(arguments))
    world_size = options.world_size if options.world_size is not None else world_size_of(os.environ)
    given = speed_of(options)
    if given is not None and options.without_data:
        raise ValueError(
            f"{SPEED_OPTION} is {given:g}, but {WITHOUT_DATA} leaves unknown how many tokens the run has: leave one of "
            "them out"
        )
    config = load_config(options.config, overrides)
    with Phases("reading the model's configuration") as phases:
        # Heavy imports wait until the configuration has been found to be sound.
        import torch

        from dora_dist.memory.estimate import card_bytes, estimate_memory
        from dora_dist.runs.speed import find_speed
        from dora_dist.setup.forecast import forecast_memory, forecast_time

        estimate_memory(config, world_size, options.device)  # reports an invalid configuration before the data are read
        phases.phase = f"preparing data, for the lengths of rows ({WITHOUT_DATA} leaves it out)"
        train, unread = (None, f"{WITHOUT_DATA} was given") if options.without_data else read_rows(config)
        phases.phase = "estimating"
        card = card_bytes(torch.device("cuda")) if options.device == "cuda" and torch.cuda.is_available() else None
        memory = forecast_memory(config, world_size, options.device, train, unread, card)
        speed = find_speed(Path(config.output_dir), given)
        time = forecast_time(config, memory.most, train, speed) if train is not None and speed is not None else None
    print(as_json(memory, time) if options.json else "\n".join(part.render() for part in (memory, time) if part))


def read_rows(config: RunConfig) -> tuple["Sequence[PreparedSource] | None", str]:
    """The training sources and "", or None and the reason why they cannot be read: an estimate needs no data."""
    from dora_dist.setup.run_data import read_data

    try:
        # Standard output is for the estimate; libraries write there too.
        with contextlib.redirect_stdout(sys.stderr):
            return read_data(config)[1].train, ""
    except ValueError as error:
        return None, str(error)


if __name__ == "__main__":
    run_command(main)
