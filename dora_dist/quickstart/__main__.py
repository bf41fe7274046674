"""Command line of the quickstart: `python -m dora_dist.quickstart --output DIR`."""

import argparse
import sys
from pathlib import Path

from dora_dist.quickstart.folder import DEFAULT_OUTPUT, ensure_quickstart


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dora_dist.quickstart",
        description="Generate a small LLaMA backbone and instruction data for it, without a network, in "
        "about a minute on two CPU cores. Writes DIR/backbone (Hugging Face layout), DIR/train.jsonl, "
        "DIR/heldout.jsonl and DIR/search.jsonl (alpaca rows; the last, held out too, is for choosing settings). A "
        "folder that is up to date is left as it is.",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the text and the model; default: %(default)s"
    )
    arguments = parser.parse_args()
    try:
        ensure_quickstart(arguments.output, arguments.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
