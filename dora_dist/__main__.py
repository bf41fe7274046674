"""One command for everything: ``dora-dist COMMAND``, the same as ``python -m dora_dist COMMAND``."""

import sys
from collections.abc import Sequence
from importlib import import_module

from dora_dist import __version__
from dora_dist.config.checks import nearest
from dora_dist.console.command import run_command

COMMANDS = {
    "quickstart": (
        "dora_dist.quickstart.__main__",
        "generate a small model and data, and tune it: a few minutes on a CPU",
    ),
    "recipe": ("dora_dist.setup.recipe", "list or print configurations to start from, or write Slurm scripts"),
    "quantize": ("dora_dist.quantize.__main__", "write a base in 4 bits once, for all runs on it"),
    "prepare": ("dora_dist.prepare", "encode the data of a run once, in parallel"),
    "preview": ("dora_dist.preview.__main__", "show examples token by token, as training will see them"),
    "estimate": ("dora_dist.estimate", "estimate memory per GPU and time; reads no weights"),
    "doctor": ("dora_dist.doctor.__main__", "check this machine or job: versions, GPUs, network, folder"),
    "train": ("dora_dist.train:start", "train or resume a run; starts one process for each GPU"),
    "report": ("dora_dist.report", "print the summary of a run and draw its pictures"),
    "generate": ("dora_dist.generate.__main__", "generate answers of the base and of the adapter, or converse"),
    "evaluate": ("dora_dist.evaluate.__main__", "measure base and adapter on tasks of lm-eval-harness"),
    "export": ("dora_dist.export.__main__", "export the adapter for PEFT and servers, or merged into the model"),
    "compare": ("dora_dist.compare.__main__", "compare methods x budgets x seeds on the same data"),
    "benchmark": ("dora_dist.benchmark.__main__", "measure speed and memory beside the frozen base and PEFT"),
    "planted": ("dora_dist.planted.__main__", "experiment: does the method find known ranks?"),
}
"""Command -> the module that takes its arguments (with the function, if it is not ``main``), and what it does."""

NOT_THE_OTHER = (
    "Dynamic Low-Rank Adaptation (Mao et al., ACL 2024), not Weight-Decomposed DoRA, which PEFT calls use_dora."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names.

    Raises:
        ValueError: there is no such command.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"dora-dist {__version__}")
    elif name in COMMANDS:
        module, _, function = COMMANDS[name][0].partition(":")
        getattr(import_module(module), function or "main")(rest)
    else:
        raise ValueError(f"{name!r} is not a command{nearest(name, COMMANDS)} (dora-dist --help lists them)")


def usage() -> str:
    """All commands with what they do."""
    lines = [f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dora-dist COMMAND [arguments]",
            "",
            NOT_THE_OTHER,
            "",
            *lines,
            "",
            "dora-dist COMMAND --help describes a command.",
        ]
    )


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()
