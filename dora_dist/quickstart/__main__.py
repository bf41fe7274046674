"""From nothing to a tuned adapter: a small model and its data, training under ZeRO-2, summary."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from dora_dist.console.command import run_command
from dora_dist.console.shipped import shipped

DEFAULT_OUTPUT = Path("dora-quickstart")
ROWS_PER_STEP = 16


def build_parser() -> argparse.ArgumentParser:
    """The command line, without the overrides."""
    parser = argparse.ArgumentParser(
        prog="dora-dist quickstart",
        usage="%(prog)s [--output DIR] [--prepare-only] [--seed N] [--section.key value ...]",
        description="Generate a small LLaMA backbone and instruction data for it, without a network, and tune it: two "
        "ranks on CPUs, or one for each GPU. Writes DIR/backbone (Hugging Face layout), DIR/train.jsonl, "
        "DIR/heldout.jsonl and DIR/search.jsonl (alpaca rows; the last, held out too, is for choosing settings), and a "
        "folder for each run. Data that are up to date are left as they are. Keys of the run can be overridden as "
        "--section.key value.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--prepare-only", action="store_true", help="generate model and data, and do not train")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the text and the model; default: %(default)s"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate, and train.

    Raises:
        ValueError: The folder is not one of the quickstart, or a key of the run is wrong.
        SystemExit: Training has failed; with its exit status.
    """
    options, overrides = build_parser().parse_known_args(arguments)
    if options.prepare_only and overrides:
        raise ValueError(
            f"{overrides[0]} is a key of the run, but --prepare-only does not train: leave one of them out"
        )
    from dora_dist.distributed.start_ranks import number_of_ranks

    processes, gpus = number_of_ranks("zero2", None)
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what transformers imports of DeepSpeed warns without it
    from dora_dist.quickstart.folder import ensure_quickstart

    ensure_quickstart(options.output, options.seed)
    if not options.prepare_only:
        train(options.output, processes, gpus, overrides)


def train(folder: Path, processes: int, gpus: int, overrides: Sequence[str]) -> None:
    """Tune the model in ``folder`` into a new folder beside it, on that many ranks."""
    from dora_dist.distributed.start_ranks import start_ranks

    values = {
        "model.path": folder / "backbone",
        "data.train": folder / "train.jsonl",
        "data.eval": folder / "heldout.jsonl",
        "data.cache_dir": folder / "cache",
        "output_dir": folder / time.strftime("run-%Y%m%d-%H%M%S"),
        "training.per_device_train_batch_size": max(1, ROWS_PER_STEP // processes),
    }
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    config = shipped("configs") / "quickstart.yaml"
    arguments = ["--config", str(config), *options, *overrides]
    if status := start_ranks("zero2", processes, gpus, "dora_dist.train", arguments):
        raise SystemExit(status)


if __name__ == "__main__":
    run_command(main)
