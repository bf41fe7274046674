"""What is asked: texts, lines and conversations, worded as the run was trained."""

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.console.text import say
from dora_dist.data.reading.row_json import parse_json
from dora_dist.data.reading.samples import (
    ALSO_CALLED,
    CHAT_FIELDS,
    CONTEXT_FIELDS,
    ROLES,
    Chat,
    Instruction,
    RowFlaw,
    alpaca_prompt,
    fields_of,
    fill_prompt,
    gives_context,
    has_value_at,
    is_empty,
    names_in,
    rename_fields,
)

if TYPE_CHECKING:
    from dora_dist.data.encoding.chat import ChatRenderer
    from dora_dist.data.encoding.control_tokens import ControlTokens
    from dora_dist.runs.adapter_folder.use import Use


@dataclass(frozen=True)
class PromptRequest:
    """What is asked, before it is rendered for the model.

    Attributes:
        text: an instruction, or with ``raw`` the whole prompt.
        context: input of the instruction; may be empty.
        raw: whether nothing is put around the text.
        messages: a conversation instead of a text, as in training.
        tools: JSON schemas of the tools that the assistant may call in it, or None.
        options: values for variables of the chat template.
        row: fields of the line that was given, for the run's own prompt.
        place: place of the line, for messages.
        flaw: reason why the line asks nothing unless the run has a prompt of its own; empty for none.
    """

    text: str = ""
    context: str = ""
    raw: bool = False
    messages: Sequence[Mapping[str, Any]] = ()
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict)
    place: str = "the conversation"
    flaw: str = ""

    def conversation(self) -> list[dict[str, Any]]:
        """The messages, of which the last one is answered."""
        return [*map(dict, self.messages)] or Instruction(self.text, self.context, "").as_chat().messages[:-1]

    def prompt(self, tokenizer: Any, chat: bool, controls: "ControlTokens | None" = None) -> str:
        """The prompt as text, as in training.

        Args:
            tokenizer: the run's tokenizer.
            chat: whether the run was trained in a chat template.
            controls: what becomes of control tokens in texts, for a prompt that is to be encoded.

        Raises:
            ValueError: this is a conversation, and the run knows none or would have refused it in training.
        """
        if self.raw:
            return self.text
        if not chat and self.messages:
            raise ValueError("messages are given, but this run was not trained in a chat template: give instructions")
        if not chat:
            return alpaca_prompt(self.text, self.context)
        try:
            return _renderer(tokenizer, tokenizer.get_chat_template(), controls).asked(
                Chat(self.conversation(), self.tools, options=self.options)
            )
        except RowFlaw as flaw:
            raise ValueError(f"{self.place}: {flaw}") from None

    def ids(self, tokenizer: Any, chat: bool, controls: "ControlTokens") -> list[int]:
        """The token ids of :meth:`prompt`, as in training.

        Raises:
            ValueError: a text holds a control token that training would have refused.
        """
        from dora_dist.data.encoding.text import encode_prompts

        texts = [self.text, self.context, json.dumps([*self.messages, self.tools, self.options], ensure_ascii=False)]
        if (controls.as_text or not self.raw) and (found := controls.refused.search("\n".join(texts))):
            raise ValueError(
                f"a prompt holds the control token {found[0]!r}, {controls.reason}: leave it out"
                + ", or give the whole prompt as it is, with --raw" * (not controls.as_text)
            )
        prompt = self.prompt(tokenizer, chat, controls)
        if chat and not self.raw:  # the template writes the start token itself
            ids: list[int] = controls.writer(prompt, add_special_tokens=False)["input_ids"]
            return ids
        return encode_prompts(controls.writer, [prompt])[0]


@lru_cache(maxsize=4)
def _renderer(tokenizer: Any, template: str, controls: "ControlTokens | None") -> "ChatRenderer":
    from dora_dist.data.encoding.chat import ChatRenderer

    return ChatRenderer(tokenizer, template, controls)


def as_asked(
    use: "Use", questions: Iterable[PromptRequest], system: str | None, raw: bool = False
) -> Iterable[PromptRequest]:
    """Questions with what training has put around them: the run's own prompt, its chat template and its system message.

    Args:
        use: how the run's adapter is used.
        questions: a list, which is checked at once, or what is typed line by line.
        system: system message; None for the run's own.
        raw: whether nothing is put around the field ``prompt`` of a line.

    Raises:
        ValueError: sources of the run differ in what they put around a row, or a question does not fit, or training
            would have refused it.
    """
    if system and not use.chat:
        raise ValueError(f"--system is {system!r}, but this run was not trained in a chat template: leave it out")
    if system is None and use.chat and len(use.systems) > 1:
        raise ValueError(
            f"the sources of this run have different messages of the system ({', '.join(map(repr, use.systems))}): "
            "choose one with --system TEXT, or none with --system ''"
        )
    wanted = use.systems[0] if system is None else system
    own = use.prompts[0] if len(use.prompts) == 1 else None
    if own is None and use.prompts != [None]:
        say("the sources of this run have different prompts: none of them is put around what is asked")
    fields = use.fields[0] if len(use.fields) == 1 and own is None else {}
    ignore = set.intersection(*map(set, use.ignore))
    read = (_question_of_row(each.row, each.place, fields, ignore) if each.row else each for each in questions)
    as_trained = (question if raw or not use.chat else _in_chat(question) for question in read)
    worded = (_worded(question, own, wanted if use.chat else "", use.chat, ignore) for question in as_trained)
    return list(worded) if isinstance(questions, list) else worded


def _in_chat(question: PromptRequest) -> PromptRequest:
    """The fields of a line as training reads them: ``prompt`` as the user's message, messages in one form."""
    if question.raw and question.row:
        return PromptRequest(question.text, row=question.row, place=question.place)
    if not question.messages or not question.row:
        return question
    from dora_dist.data.row_formats import asked_conversation

    try:
        chat = asked_conversation(question.row)
    except RowFlaw as flaw:
        raise ValueError(f"{question.place}: {flaw}") from None
    return replace(question, messages=chat.messages, tools=chat.tools, options=chat.options)


def _worded(
    question: PromptRequest, own: str | None, system: str, chat: bool, ignore: Collection[str]
) -> PromptRequest:
    if own is not None and not question.messages:
        question = _in_own_prompt(question, own, chat, ignore)
    if question.flaw:
        raise ValueError(question.flaw)
    if not system or question.raw or (question.messages and question.messages[0]["role"] == "system"):
        return question
    messages = [{"role": "system", "content": system}, *question.conversation()]
    return PromptRequest(messages=messages, tools=question.tools, options=question.options, place=question.place)


def _in_own_prompt(question: PromptRequest, own: str, chat: bool, ignore: Collection[str]) -> PromptRequest:
    """What the run's own prompt makes of a row that has its fields, or of text for its only field."""
    fields = names_in(own)
    text = None
    with suppress(RowFlaw):
        text = fill_prompt(own, question.row)
    if text is None and (question.raw or question.row.get("prompt")):
        return question
    if text is not None and (lost := _lost(question.row, fields, ignore)):
        raise ValueError(f"{question.place} has {lost}, which the prompt of this run does not name: leave it out")
    if text is None and not question.row and len(fields) == 1 and not question.context:
        text = fill_prompt(own, dict.fromkeys(fields, question.text))
    if text is None:
        raise ValueError(
            f"this run was trained with the prompt {own!r}: give its fields ({', '.join(sorted(fields))}) as JSON, an "
            "object a line of standard input, or the whole prompt with --raw"
        )
    return PromptRequest(messages=[{"role": "user", "content": text}]) if chat else PromptRequest(text, raw=True)


def collect_questions(
    texts: Sequence[str] | None, context: str | None, raw: bool, file: Path | None = None
) -> Iterable[PromptRequest]:
    """Everything that is asked. All is checked at once, except what is typed line by line.

    Args:
        texts: the texts of ``--prompt``; None without.
        context: input that belongs to them; None for none.
        raw: whether plain text is the whole prompt.
        file: file with a question a line; None for standard input, where there are no texts.

    Raises:
        ValueError: a prompt is empty, a JSON line is of no known form, or the file cannot be read.
    """
    if texts is not None:
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise ValueError(f"--prompt number {number} is {text!r}, but must have some text")
        return [PromptRequest(text, context or "", raw) for text in texts]
    if file is not None:
        found = list(read_questions(_lines_of(file), raw, str(file)))
        if not found:
            raise ValueError(f"--file {file} has no lines: give an instruction a line")
        return found
    questions = read_questions(sys.stdin, raw)
    if sys.stdin.isatty():
        say("One instruction a line; Ctrl-D ends.")
        return questions
    found = list(questions)
    if not found:
        raise ValueError("standard input has no lines: give an instruction a line, or --prompt TEXT")
    return found


def _lines_of(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:  # a line ends at a line break only, as in training
            return list(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file is {file}, which cannot be read: {error}") from None


def read_questions(lines: Iterable[str], raw: bool, where: str = "standard input") -> Iterator[PromptRequest]:
    """Questions from lines of text or JSON; empty lines are passed over.

    Args:
        lines: the lines.
        raw: whether plain text is the whole prompt.
        where: the place that they come from, for messages.

    Raises:
        ValueError: a line begins as a JSON object and is none, or its fields are not known.
    """
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        yield (
            _question_of_json(text, f"line {number} of {where}")
            if text.lstrip().startswith("{")
            else PromptRequest(text, raw=raw)
        )


def _question_of_json(text: str, place: str) -> PromptRequest:
    try:
        row: dict[str, Any] = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} begins with {{ and cannot be read as JSON ({error}): fix it, or give text that begins so with "
            "--prompt"
        ) from None
    return _question_of_row(row, place)


def _question_of_row(
    row: Mapping[str, Any], place: str, fields: Mapping[str, str] | None = None, ignore: Collection[str] = ()
) -> PromptRequest:
    """What a line asks; see :attr:`PromptRequest.flaw` for one that asks nothing.

    Args:
        row: the fields of the line.
        place: where the line is, for messages.
        fields: a format's name of a field -> the name that the line may have in its place.
        ignore: fields that are passed over.
    """
    named = {name: own for name, own in (fields or {}).items() if has_value_at(row, own)}
    said = rename_fields(row, named)
    messages = said.get("messages") or []
    texts = {name: said.get(name) or "" for name in ("prompt", "instruction", "input")}
    known = all(isinstance(value, str) for value in texts.values()) and _are_messages(messages)
    asked = PromptRequest(row=said, place=place)
    if not known or [bool(part) for part in (texts["prompt"], texts["instruction"], messages)].count(True) != 1:
        flaw = (
            f"{place} is {json.dumps(row, ensure_ascii=False)}, but must have text either in the field prompt or in "
            "the field instruction (and perhaps input), or a list of messages, each with role "
            f"({', '.join(ROLES)}) and content"
        )
        return replace(asked, flaw=flaw)
    if messages and messages[-1]["role"] == "assistant":
        return replace(asked, flaw=f"{place} ends with an answer of the assistant: remove that message")
    read = CHAT_FIELDS if messages else ("input",) if texts["instruction"] else ()
    if lost := _lost(row, [*named.values(), *(name for name in read if name not in named)], ignore):
        beside = "messages" if messages else "text"
        flaw = f"{place} has {lost} beside its {beside}, which is not read: {_way_out(lost, read, said)}"
        return replace(asked, flaw=flaw)
    if messages:
        return replace(asked, messages=messages)
    if texts["prompt"]:
        return replace(asked, text=texts["prompt"], raw=True)
    return replace(asked, text=texts["instruction"], context=texts["input"])


def _lost(row: Mapping[str, Any], read: Iterable[str], ignore: Collection[str]) -> str | None:
    """The first field that training would not have lost, of a row of which these names and paths are read."""
    passed = {*ignore, *fields_of(row, read)}
    return next((name for name in CONTEXT_FIELDS if name not in passed and gives_context(row.get(name))), None)


def _way_out(name: str, read: Collection[str], said: Mapping[str, Any]) -> str:
    """What to do with a field that is not read."""
    known = ALSO_CALLED.get(name, name)
    if known != name and known in read and is_empty(said.get(known)):
        return f"call it {known}"
    if name in ("input", "context"):
        return "write it into the text"
    if known in (*CHAT_FIELDS, "history") and "messages" not in said:
        return "give all of it as messages"
    return "leave it out"


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.get("role") in ROLES
        and (isinstance(entry.get("content"), str | list) or entry.get("tool_calls"))
        for entry in value
    )
