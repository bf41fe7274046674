"""Encode the data of a run once, in parallel, before any process group exists.

The result lies in data.cache_dir under a name that stands for data, tokenizer, template and rules; all ranks of every
run with the same ones read it from there. A run whose data is not prepared prepares it itself when it starts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dora_dist.config.command_line import with_config_option
from dora_dist.config.parse import load_config
from dora_dist.console.arguments import CONFIG_HELP
from dora_dist.console.command import run_command
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.console.text import say


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist prepare",
        usage="%(prog)s CONFIG [--section.key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every key of the configuration can be overridden as --section.key value; data.workers says how many "
        "processes encode.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG", help=CONFIG_HELP)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the data, and print what was found.

    Raises:
        ValueError: the configuration or the input is invalid.
    """
    quiet_libraries()
    options, overrides = build_parser().parse_known_args(with_config_option(arguments))
    config = load_config(options.config, overrides)
    # Heavy imports wait until the configuration has been found to be sound.
    from dora_dist.data.prepared import render
    from dora_dist.setup import run_data

    with Phases("preparing data"):
        _, data = run_data.read_data(config)
    for remark in data.remarks():
        say(remark)
    print(render("training data", data.train))
    if data.evaluation:
        print(render("held-out data", data.evaluation))
    folders = sorted({str(source.folder) for source in (*data.train, *data.evaluation)})
    print("prepared in\n  " + "\n  ".join(folders))


if __name__ == "__main__":
    run_command(main)
