"""What a run did, from its files alone: a summary to read, and pictures.

``dora-dist report RUN`` prints the summary and draws the pictures again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dora_dist.console.command import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the summary of a run, and draw its pictures.

    Raises:
        ValueError: the folder is not that of a run.
    """
    parser = argparse.ArgumentParser(prog="dora-dist report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run (output_dir of its configuration)")
    run = parser.parse_args(arguments).run
    from dora_dist.runs.summary import report  # matplotlib and torch are heavy imports

    print(report(run))


if __name__ == "__main__":
    run_command(main)
