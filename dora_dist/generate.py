"""Generate answers of the base and of the adapter of a run side by side, decoded greedily.

Without --prompt, instructions are read from standard input, one a line: plain text, or JSON objects with the field
instruction (and perhaps input) or messages, rendered as in training, or the field prompt, taken as it is. Of a run
with a prompt of its own (data.prompt), they are the rows that it takes, or text in the place of its only field.
"""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from dora_dist.console.command import run_command
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.console.text import say
from dora_dist.data.reading.samples import ROLES

if TYPE_CHECKING:
    from dora_dist.data.encoding.control_tokens import ControlTokens
    from dora_dist.runs.trained_run import TrainedRun

LEAST_WIDTH = 80
"""Columns of a terminal from which two answers fit side by side."""
GAP = " | "


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run (output_dir of its configuration)")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more instructions")
    parser.add_argument("--input", metavar="TEXT", help="input that belongs to the instructions (Alpaca's field input)")
    parser.add_argument("--raw", action="store_true", help="plain text is the whole prompt, not an instruction")
    parser.add_argument("--system", metavar="TEXT", help="system message in a chat template; by default data.system")
    parser.add_argument("--checkpoint", metavar="NAME", help="such as checkpoint-120, instead of the final adapter")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="length limit of an answer in tokens; by default evaluation.max_new_tokens of the run",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer every prompt twice, printing as soon as both answers are there.

    Raises:
        ValueError: The configuration or the input is invalid.
    """
    quiet_libraries()
    options = build_parser().parse_args(arguments)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}, but must be at least 1")
    if options.input is not None and (options.prompt is None or options.raw):
        raise ValueError(
            f"--input is {options.input!r}, but it belongs to the instructions of --prompt: leave out --raw, and give "
            'the input of lines from standard input as {"instruction": ..., "input": ...}'
        )
    questions = collect_questions(options.prompt, options.input, options.raw)
    # Heavy imports wait until the arguments have been found to be sound.
    from dora_dist.runs.trained_run import open_run

    trained = open_run(options.run, options.checkpoint)
    plain = not trained.chat and trained.formats <= {"prompt_completion", "text"}
    if plain and options.prompt is not None and not options.raw:
        formats = ", ".join(sorted(trained.formats))
        say(f"this run was trained on texts as they are (format {formats}): --raw gives prompts so")
    questions = as_asked(trained, questions, options.system)
    answers = answer_twice(trained, questions, options.max_new_tokens or trained.config.evaluation.max_new_tokens)
    for prompt, base, adapted in answers:
        print(render(prompt, base, adapted, terminal_width()), flush=True)


@dataclass(frozen=True)
class Question:
    """What is asked, before it is rendered for the model.

    Attributes:
        text: an instruction, or where it is ``raw`` the whole prompt.
        context: what the instruction is about.
        raw: nothing is put around the text.
        messages: a conversation instead of a text.
        row: what stood in the line, for the run's own prompt.
        flaw: why there is nothing to ask without such a prompt.
    """

    text: str = ""
    context: str = ""
    raw: bool = False
    messages: Sequence[Mapping[str, Any]] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    flaw: str = ""

    def conversation(self) -> list[Mapping[str, Any]]:
        """The messages, of which the last one is answered."""
        from dora_dist.data.reading.samples import Instruction

        return list(self.messages or Instruction(self.text, self.context, "").as_chat().messages[:-1])

    def prompt(self, tokenizer: Any, chat: bool, controls: "ControlTokens | None" = None) -> str:
        """The prompt as text, as in training.

        Args:
            tokenizer: of the run.
            chat: the run was trained on conversations.
            controls: what becomes of control tokens in texts, for a prompt that is to be encoded.

        Raises:
            ValueError: a conversation for a run that knows none.
        """
        from dora_dist.data.reading.samples import alpaca_prompt

        if self.raw:
            return self.text
        if not chat and self.messages:
            raise ValueError("messages are given, but this run was not trained in a chat template: give instructions")
        if not chat:
            return alpaca_prompt(self.text, self.context)
        messages = self.conversation()
        messages = messages if controls is None else controls.exchanged(messages)
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text if controls is None else controls.exchanged(text)

    def ids(self, tokenizer: Any, chat: bool, controls: "ControlTokens") -> list[int]:
        """The token ids of :meth:`prompt`, as in training.

        Raises:
            ValueError: a text holds a control token that training would have refused.
        """
        from dora_dist.data.encoding.text import encode_prompts

        texts = [self.text, self.context, json.dumps(list(self.messages), ensure_ascii=False)]
        if (controls.as_text or not self.raw) and (found := controls.refused.search("\n".join(texts))):
            raise ValueError(
                f"a prompt holds the control token {found[0]!r}, {controls.reason}: leave it out"
                + ", or give the whole prompt as it is, with --raw or in the field prompt" * (not controls.as_text)
            )
        prompt = self.prompt(tokenizer, chat, controls)
        if chat and not self.raw:  # the template writes the start token itself
            ids: list[int] = controls.writer(prompt, add_special_tokens=False)["input_ids"]
            return ids
        return encode_prompts(controls.writer, [prompt])[0]


def as_asked(trained: "TrainedRun", questions: Iterable[Question], system: str | None) -> Iterable[Question]:
    """Questions with what training has put around them: the run's own prompt, and its message of the system.

    Args:
        trained: the run.
        questions: a list, which is checked at once, or what is typed line by line.
        system: instead of the run's message.

    Raises:
        ValueError: sources of the run differ in what they put around a row, or a question does not fit.
    """
    if system and not trained.chat:
        raise ValueError(f"--system is {system!r}, but this run was not trained in a chat template: leave it out")
    if system is None and trained.chat and len(trained.systems) > 1:
        raise ValueError(
            f"the sources of this run have different messages of the system ({', '.join(map(repr, trained.systems))}): "
            "choose one with --system TEXT, or none with --system ''"
        )
    wanted = next(iter(trained.systems)) if system is None else system
    own = next(iter(trained.prompts)) if len(trained.prompts) == 1 else None
    if own is None and trained.prompts != {None}:
        say("the sources of this run have different prompts: none of them is put around what is asked")
    worded = (_worded(question, own, wanted if trained.chat else "", trained.chat) for question in questions)
    return list(worded) if isinstance(questions, list) else worded


def _worded(question: Question, own: str | None, system: str, chat: bool) -> Question:
    if own is not None and not question.messages:
        question = _in_own_prompt(question, own, chat)
    elif question.flaw:
        raise ValueError(question.flaw)
    if not system or question.raw or (question.messages and question.messages[0]["role"] == "system"):
        return question
    return Question(messages=[{"role": "system", "content": system}, *question.conversation()])


def _in_own_prompt(question: Question, own: str, chat: bool) -> Question:
    """What the run's own prompt makes of a row that has its fields, or of text for its only field."""
    from dora_dist.data.reading.samples import RowFlaw, fill_prompt

    fields = {name for _, name, _, _ in Formatter().parse(own) if name is not None}
    text = None
    with suppress(RowFlaw):
        text = fill_prompt(own, question.row)
    if text is None and question.raw:
        return question
    if text is None and not question.row and len(fields) == 1 and not question.context:
        text = fill_prompt(own, dict.fromkeys(fields, question.text))
    if text is None:
        raise ValueError(
            f"this run was trained with the prompt {own!r}: give its fields ({', '.join(sorted(fields))}) as JSON, an "
            "object a line of standard input, or the whole prompt with --raw"
        )
    return Question(messages=[{"role": "user", "content": text}]) if chat else Question(text, raw=True)


def collect_questions(texts: Sequence[str] | None, context: str | None, raw: bool) -> Iterable[Question]:
    """Everything that is asked. All is checked at once, except what is typed line by line.

    Raises:
        ValueError: a prompt is empty or a JSON line is of no known form.
    """
    if texts is not None:
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise ValueError(f"--prompt number {number} is {text!r}, but must have some text")
        return [Question(text, context or "", raw) for text in texts]
    questions = read_questions(sys.stdin, raw)
    if sys.stdin.isatty():
        say("One instruction a line; Ctrl-D ends.")
        return questions
    found = list(questions)
    if not found:
        raise ValueError("standard input has no lines: give an instruction a line, or --prompt TEXT")
    return found


def read_questions(lines: Iterable[str], raw: bool) -> Iterator[Question]:
    """Questions from lines of text or JSON; empty lines are passed over.

    Raises:
        ValueError: a line begins as a JSON object and is none, or its fields are not known.
    """
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        yield _question_of_json(text, number) if text.lstrip().startswith("{") else Question(text, raw=raw)


def _question_of_json(text: str, number: int) -> Question:
    try:
        row: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {number} of standard input begins with {{ and is not JSON ({error}): fix it, or give text that "
            "begins so with --prompt"
        ) from None
    messages = row.get("messages") or []
    fields = {name: row.get(name) or "" for name in ("prompt", "instruction", "input")}
    known = all(isinstance(value, str) for value in fields.values()) and _are_messages(messages)
    if not known or [bool(part) for part in (fields["prompt"], fields["instruction"], messages)].count(True) != 1:
        flaw = (
            f"line {number} of standard input is {text}, but must have text either in the field prompt or in the field "
            f"instruction (and perhaps input), or a list of messages, each with role ({', '.join(ROLES)}) and content"
        )
        return Question(row=row, flaw=flaw)
    if messages:
        return Question(messages=messages)
    if fields["prompt"]:
        return Question(fields["prompt"], raw=True, row=row)
    return Question(fields["instruction"], fields["input"], row=row)


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and entry.get("role") in ROLES and isinstance(entry.get("content"), str)
        for entry in value
    )


def answer_twice(trained: Any, questions: Iterable[Question], max_new_tokens: int) -> Iterator[tuple[str, str, str]]:
    """Prompt, answer of the base, answer of the adapter: one model in memory, with the adapter switched off and on.

    Args:
        trained: the :class:`~dora_dist.runs.trained_run.TrainedRun`.
        questions: what is asked.
        max_new_tokens: longest answer, in tokens.
    """
    from dora_dist.data.encoding.chat import stop_tokens
    from dora_dist.data.encoding.control_tokens import control_tokens
    from dora_dist.evaluation.answers import generate_answers
    from dora_dist.routing.loading import load_adapter
    from dora_dist.runs.trained_run import default_device

    device = default_device()
    tokenizer = trained.load_tokenizer()
    stop = stop_tokens(tokenizer, tokenizer.get_chat_template() if trained.chat else None)
    controls = control_tokens(tokenizer, trained.config.data.control_tokens)
    asked: Iterable[tuple[Question, list[int]]]
    asked = ((question, question.ids(tokenizer, trained.chat, controls)) for question in questions)
    if isinstance(questions, list):  # all is checked before the model is read, except what is typed line by line
        asked = list(asked)
    # bfloat16 is far slower than float32 on most CPUs.
    with Phases("loading the model"):
        base = trained.load_base(device, in_float32=device.type == "cpu")
        model = load_adapter(base, trained.adapter)
    for question, ids in asked:
        with model.disable_adapter():
            (before,) = generate_answers(model, tokenizer, [ids], max_new_tokens, stop)
        (after,) = generate_answers(model, tokenizer, [ids], max_new_tokens, stop)
        yield question.prompt(tokenizer, trained.chat), before, after


def terminal_width() -> int | None:
    """Columns of the terminal that is written to, or None if it is not one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def render(prompt: str, base: str, adapted: str, width: int | None) -> str:
    """Prompt and answers: in two columns where ``width`` allows it, otherwise one below the other."""
    prompt, base, adapted = (_printable(text).strip() for text in (prompt, base, adapted))
    if width is None or width < LEAST_WIDTH:
        return f"--- prompt\n{prompt}\n--- base\n{base}\n--- adapter\n{adapted}\n"
    column = (width - len(GAP)) // 2
    left, right = _column("base", base, column), _column("adapter", adapted, column)
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    rows = [f"{a:<{column}}{GAP}{b}".rstrip() for a, b in zip(left, right, strict=True)]
    return "\n".join([*_wrapped(prompt, width), "", *rows, "=" * width, ""])


def _column(title: str, text: str, width: int) -> list[str]:
    return [title, "-" * width, *_wrapped(text, width)]


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]


def _printable(text: str) -> str:
    """Without control characters, which a model may produce and a terminal would obey."""
    return "".join(character for character in text.expandtabs(4) if character.isprintable() or character == "\n")


if __name__ == "__main__":
    run_command(main)
