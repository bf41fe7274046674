"""The quickstart command: prepares a model and data, trains under ZeRO-2, and prints a summary."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from dora_dist.config.command_line import options
from dora_dist.console.command import run_command
from dora_dist.console.files import read_lines
from dora_dist.console.shipped import shipped
from dora_dist.quickstart import smollm2
from dora_dist.quickstart.folder import SMOLLM2, TINY, ensure_quickstart

DEFAULT_OUTPUT = "dora-quickstart"
CONFIGS = {TINY: "quickstart.yaml", SMOLLM2: "quickstart-smollm2.yaml"}
ROWS_PER_STEP = {TINY: 16, SMOLLM2: 8}


def build_parser() -> argparse.ArgumentParser:
    """The command's own options, without the overrides."""
    parser = argparse.ArgumentParser(
        prog="dora-dist quickstart",
        usage="%(prog)s [--model tiny|smollm2 [--yes]] [--output DIR] [--prepare-only] [--seed N] "
        "[--section.key value ...]",
        description="Generate instruction data, and tune a model on them: two ranks on CPUs, or one for each GPU. The "
        "model is a small generated LLaMA, which needs no network, or SmolLM2-135M-Instruct, which is downloaded "
        "once. Writes DIR/backbone (Hugging Face layout), DIR/train.jsonl, DIR/heldout.jsonl and DIR/search.jsonl "
        "(alpaca rows; the last, also held out, is for choosing settings), and a folder for each run. Model and data "
        "that are up to date are reused. Keys of the run can be overridden as --section.key value.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        choices=list(CONFIGS),
        default=TINY,
        help=f"{TINY}: 1 million parameters, generated; {SMOLLM2}: {smollm2.WHAT}; default: %(default)s",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"default: {DEFAULT_OUTPUT}, or {DEFAULT_OUTPUT}-{SMOLLM2}"
    )
    parser.add_argument("--yes", action="store_true", help="download without asking")
    parser.add_argument("--prepare-only", action="store_true", help="prepare model and data without training")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the text and the model; default: %(default)s"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare model and data, and train.

    Raises:
        ValueError: the folder is not a quickstart's, a key of the run is wrong, or a download is not permitted.
        SystemExit: training failed; the exit status is training's.
    """
    given, overrides = build_parser().parse_known_args(arguments)
    if given.prepare_only and overrides:
        raise ValueError(f"{overrides[0]} is a key of the run, but --prepare-only does not train: omit one of them")
    from dora_dist.distributed.start_ranks import number_of_ranks

    processes, gpus = number_of_ranks("zero2", None)
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it, DeepSpeed warns when transformers imports it
    folder = given.output or Path(DEFAULT_OUTPUT if given.model == TINY else f"{DEFAULT_OUTPUT}-{given.model}")
    ensure_quickstart(folder, given.seed, model=given.model, may_fetch=lambda: given.yes or agreed())
    if not given.prepare_only:
        train(given.model, folder, processes, gpus, overrides)


def agreed() -> bool:
    """Ask the user whether to download a model.

    Raises:
        ValueError: there is no terminal to ask on.
    """
    question = f"fetch {smollm2.WHAT}"
    if not sys.stdin.isatty():
        raise ValueError(f"--model {SMOLLM2} would {question}, but there is no terminal to ask on: add --yes")
    return input(f"{question[0].upper()}{question[1:]}? [y/N] ").strip().lower() in ("y", "yes")


def train(model: str, folder: Path, processes: int, gpus: int, overrides: Sequence[str]) -> None:
    """Tune the model in ``folder`` in a new folder beside it, on ``processes`` ranks."""
    from dora_dist.distributed.start_ranks import start_ranks

    values = {
        "model.path": folder / "backbone",
        "data.train": folder / "train.jsonl",
        "data.eval": folder / "heldout.jsonl",
        "data.cache_dir": folder / "cache",
        "output_dir": folder / time.strftime("run-%Y%m%d-%H%M%S"),
        "training.per_device_train_batch_size": max(1, ROWS_PER_STEP[model] // processes),
    }
    ours = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    config = shipped("configs") / CONFIGS[model]
    arguments = ["--config", str(config), *ours, *overrides]
    if status := start_ranks("zero2", processes, gpus, "dora_dist.train", arguments):
        raise SystemExit(status)
    print(first_answers(Path(dict(options(arguments))["output_dir"])), flush=True)


def first_answers(run: Path) -> str:
    """The answers to the first held-out example before and after training; empty if none were generated."""
    from dora_dist.runs.records import ANSWERS

    path = run / ANSWERS
    lines = read_lines(path) if path.is_file() else []
    if not lines:
        return ""
    first, last = lines[0], [line for line in lines if line["number"] == lines[0]["number"]][-1]
    parts = [("prompt", first["prompt"]), ("base", first["answer"]), ("tuned", last["answer"])]
    texts = [f"  {title:<16} {indent(text.strip(), ' ' * 19).strip()}" for title, text in parts]
    return "\n".join(["", "  The first held-out example:", *texts])


if __name__ == "__main__":
    run_command(main)
