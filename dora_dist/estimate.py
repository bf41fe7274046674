"""Memory that a run takes on every GPU, by part, and its tokens per step, from the model's configuration alone.

Every key of the configuration can be overridden as --section.key value, as for dora_dist.train.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.config.parse import load_config
from dora_dist.console.arguments import CONFIG_HELP, with_config_option
from dora_dist.console.command import run_command
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.distributed.launcher import world_size_of

if TYPE_CHECKING:
    from dora_dist.memory.estimate import MemoryEstimate


def as_json(estimate: "MemoryEstimate") -> str:
    """All numbers in bytes, with totals, as JSON."""
    figures: dict[str, Any] = dataclasses.asdict(estimate)
    for name in ("configured", "recomputing_none", "recomputing_all"):
        peak = getattr(estimate, name).peak
        figures[name]["peak"] = {"moment": peak.name, "bytes": peak.total}
    figures["peak_bytes"] = estimate.peak_bytes
    figures["tokens_per_micro_batch"] = estimate.tokens_per_micro_batch
    figures["tokens_per_step"] = estimate.tokens_per_step
    return json.dumps(figures, indent=2)


def build_parser() -> argparse.ArgumentParser:
    """The command line, without the overrides."""
    parser = argparse.ArgumentParser(
        prog="dora-dist estimate",
        usage="%(prog)s CONFIG [--section.key value ...] [--world-size N] [--device cuda|cpu] [--json]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="number of GPUs; by default WORLD_SIZE of the environment, or 1"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the run will be on (cuda)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the estimate.

    Raises:
        ValueError: The configuration or an option is invalid.
    """
    quiet_libraries()
    options, overrides = build_parser().parse_known_args(with_config_option(arguments))
    world_size = options.world_size if options.world_size is not None else world_size_of(os.environ)
    config = load_config(options.config, overrides)
    # Heavy imports wait until the configuration has been found to be sound.
    import torch

    from dora_dist.memory.estimate import card_bytes, estimate_memory
    from dora_dist.memory.table import render

    card = card_bytes(torch.device("cuda")) if options.device == "cuda" and torch.cuda.is_available() else None
    estimate = estimate_memory(config, world_size, options.device, card)
    print(as_json(estimate) if options.json else render(estimate))


if __name__ == "__main__":
    run_command(main)
