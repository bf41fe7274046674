"""Generate answers of the base and of the adapter of a run side by side, decoded greedily unless --temperature is set.

Without --prompt and --file, instructions are read from standard input, one a line: plain text, or JSON objects with the
field instruction (and perhaps input), messages or prompt, rendered as in training. A prompt is what the user says where
the run was trained in a chat template, and otherwise the whole text. For a run with a prompt of its own (data.prompt),
lines are rows with its fields, or text for its only field.
With --chat, lines are the turns of a conversation with the adapter.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dora_dist.config.checks import require
from dora_dist.console.arguments import add_run_options
from dora_dist.console.command import run_command
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.text import say
from dora_dist.generate.questions import as_asked, collect_questions
from dora_dist.generate.sampling import GREEDY, Sampling
from dora_dist.generate.showing import render, terminal_width

NOT_IN_CHAT = ("prompt", "file", "input", "raw", "batch_size")
"""Options that say what is asked; in a conversation, this is typed instead."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more instructions")
    asked.add_argument("--file", type=Path, metavar="FILE", help="instructions, one a line, as from standard input")
    asked.add_argument(
        "--chat", action="store_true", help="converse with the adapter: /reset forgets what was said, Ctrl-D ends"
    )
    parser.add_argument("--input", metavar="TEXT", help="input that belongs to the instructions (Alpaca's field input)")
    parser.add_argument("--raw", action="store_true", help="plain text and the field prompt are the whole prompt")
    parser.add_argument("--system", metavar="TEXT", help="system message in a chat template; by default data.system")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="length limit of an answer in tokens; by default evaluation.max_new_tokens of the run",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts that are answered at a time; by default 1")
    parser.add_argument(
        "--temperature",
        type=float,
        default=GREEDY,
        metavar="T",
        help="draw tokens by the probabilities of the logits divided by this; by default 0, the most likely token",
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="draw of the most likely tokens of this probability")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw of this many of the most likely tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="of what is drawn; by default 0")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer every prompt twice, printing as soon as both answers are there; or hold a conversation.

    Raises:
        ValueError: the configuration or the input is invalid.
    """
    quiet_libraries()
    options = build_parser().parse_args(arguments)
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed)
    _check(options)
    questions = None if options.chat else collect_questions(options.prompt, options.input, options.raw, options.file)
    # Heavy imports wait until the arguments have been found to be sound.
    from dora_dist.generate.answering import Answerer, answer_twice
    from dora_dist.runs.trained_run import open_asked

    trained = open_asked(options)
    answerer = Answerer.of(trained, sampling, options.max_new_tokens)
    if questions is None:
        from dora_dist.generate.conversing import converse

        converse(answerer, options.system)
        return
    plain = not trained.use.chat and set(trained.use.formats) <= {"prompt_completion", "text"}
    if plain and options.prompt is not None and not options.raw:
        formats = ", ".join(trained.use.formats)
        say(f"this run was trained on texts as they are (format {formats}): --raw gives prompts so")
    questions = as_asked(trained.use, questions, options.system, options.raw)
    for prompt, base, adapted in answer_twice(answerer, questions, options.batch_size or 1):
        print(render(prompt, base, adapted, terminal_width()), flush=True)


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    for name in ("max_new_tokens", "batch_size"):
        value = getattr(options, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "be at least 1")
    if options.chat:
        for name in NOT_IN_CHAT:
            if value := getattr(options, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {value}, but with --chat what is asked is typed: leave one of "
                    "them out"
                )
    if options.input is not None and (options.prompt is None or options.raw):
        raise ValueError(
            f"--input is {options.input!r}, but it belongs to the instructions of --prompt: leave out --raw, and give "
            'the input of lines from a file or standard input as {"instruction": ..., "input": ...}'
        )
    typed = options.prompt is None and options.file is None and sys.stdin.isatty()
    if typed and (options.batch_size or 1) > 1:
        raise ValueError(
            f"--batch-size is {options.batch_size}, but lines that are typed are answered one by one: give --prompt, "
            "--file, or lines through a pipe"
        )


if __name__ == "__main__":
    run_command(main)
