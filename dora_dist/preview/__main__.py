"""Show a run's examples token by token, as training will see them, with lengths and the number of optimizer steps.

Every key of the configuration can be overridden as --section.key value, as for dora-dist train. The command trains
nothing and reads no weights.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dora_dist.config.command_line import with_config_option
from dora_dist.config.parse import load_config
from dora_dist.console.arguments import CONFIG_HELP
from dora_dist.console.command import run_command
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.console.text import say
from dora_dist.distributed.launcher import world_size_of
from dora_dist.preview.contents import build_preview
from dora_dist.preview.page import build_page
from dora_dist.preview.selection import FEW, ExampleSelection
from dora_dist.preview.terminal import render


def build_parser() -> argparse.ArgumentParser:
    """The command's own options, without the overrides."""
    parser = argparse.ArgumentParser(
        prog="dora-dist preview",
        usage="%(prog)s CONFIG [--section.key value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help=f"number of examples to show; by default {FEW}, and at least one of every source",
    )
    parser.add_argument("--source", metavar="NAME", help="show this source only")
    parser.add_argument("--eval", action="store_true", help="show the held-out sources instead of the training sources")
    parser.add_argument("--longest", action="store_true", help="show the longest examples instead of the first ones")
    parser.add_argument("--truncated", action="store_true", help="show only examples that were truncated")
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of processes for which steps are counted; by default WORLD_SIZE of the environment, or 1",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the output as an HTML page")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: colour on a terminal, unless NO_COLOR is set",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the preview.

    Raises:
        ValueError: the configuration or the input is invalid.
    """
    quiet_libraries()
    options, overrides = build_parser().parse_known_args(with_config_option(arguments))
    if options.examples is not None and options.examples < 1:
        raise ValueError(f"--examples is {options.examples}, but must be at least 1")
    if options.html is not None and (options.html.is_dir() or not options.html.parent.is_dir()):
        raise ValueError(f"--html is {options.html}, but must be a file in a folder that exists")
    world_size = options.world_size if options.world_size is not None else world_size_of(os.environ)
    choice = ExampleSelection(
        number=options.examples,
        source=options.source,
        held_out=options.eval,
        longest=options.longest,
        truncated=options.truncated,
    )
    config = load_config(options.config, overrides)
    # Standard output is for the preview, but libraries print there too (DeepSpeed, a tokenizer's own code).
    with Phases("preparing data"), contextlib.redirect_stdout(sys.stderr):
        preview = build_preview(config, choice, world_size)
    if options.html is not None:
        options.html.write_text(build_page(preview), encoding="utf-8")
    _print(render(preview, _in_colour(options.color)))
    if options.html is not None:
        say(f"page written to {options.html}")


def _in_colour(wanted: str) -> bool:
    if wanted != "auto":
        return wanted == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal cannot show must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has closed the pipe (head, less); the interpreter would flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_command(main)
