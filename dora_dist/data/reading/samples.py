"""What a row says, whatever the file it came from looked like."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
THOUGHTS = "reasoning_content"
"""Key of a message's thoughts, whatever the rows and the template call them."""
UNTRAINED = "untrained"
"""Key of a message that is given, but has no loss."""
WANTED = "wanted"
"""Key of a message that is no answer and says that it is to be trained; the value is the field that says so."""
CONTEXT_FIELDS = (
    *("input", "system", "system_prompt", "history", "tools", "functions", "context", "documents"),
    *("chat_template_kwargs", "image", "images", "audio", "audios", "video", "videos"),
)
"""Fields of a row that the model would be given: where a format does not read one, a row that has it is refused."""
CHAT_FIELDS = ("system", "tools", "chat_template_kwargs")
"""Fields of a row beside its conversation."""
ALSO_CALLED = {"context": "input", "system_prompt": "system"}
"""Field of other people's rows -> what a format may read it as."""


class RowFlaw(Exception):
    """What is wrong with one row.

    Args:
        field: the field it is about; empty for the row as a whole.
        reason: what is wrong, as the rest of a sentence about the field, with the value found.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"field {field!r} {reason}" if field else f"the row {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with the answer that is wanted; the loss is on the answer only.

    Attributes:
        prompt: everything the model is given.
        completion: the answer that is wanted.
    """

    prompt: str
    completion: str

    def as_chat(self) -> "Chat":
        """The conversation of one exchange."""
        return Instruction(self.prompt, "", self.completion).as_chat()


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction with the answer that is wanted, before it is put into words for the model.

    Attributes:
        instruction: the text that says what to do.
        context: the text to do it with; may be empty.
        completion: the answer.
        system: system message; may be empty.
        history: earlier instructions with their answers.
    """

    instruction: str
    context: str
    completion: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()

    def as_pair(self) -> Pair:
        """The pair whose prompt has the plain form that Alpaca made common."""
        return Pair(alpaca_prompt(self.instruction, self.context), self.completion)

    def as_chat(self) -> "Chat":
        """The conversation whose last exchange is the instruction with its answer."""
        question = f"{self.instruction}\n\n{self.context}" if self.context else self.instruction
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in (*self.history, (question, self.completion)):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return Chat(messages)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an answer of the assistant which is trained.

    Attributes:
        messages: dictionaries with ``role`` (one of :data:`ROLES`) and ``content``, or ``tool_calls`` (as ``{function:
            {name, arguments: object}}``), and perhaps :data:`THOUGHTS`, :data:`UNTRAINED`, :data:`WANTED`,
            ``tool_call_id`` and ``name``. A content or thought is text, or a list of texts as OpenAI's content parts,
            until :meth:`~dora_dist.data.encoding.chat.ChatRenderer.joined` has made one text of it.
        tools: JSON schemas of the tools that the assistant may call, or None.
        num_trimmed: number of messages after the last one that is trained, which were left out.
        unread: fields of messages that are not read.
        options: values for variables of the chat template, which come before the defaults that it has.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    num_trimmed: int = 0
    unread: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def answers(self) -> list[int]:
        """Numbers of the messages that are trained."""
        return [n for n, m in enumerate(self.messages) if m["role"] == "assistant" and not m.get(UNTRAINED)]


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text; the loss is on all of it."""

    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text, whose answers are parts of that text.

    Attributes:
        question: what is asked.
        context: the text to find the answer in.
        answers: the answers that count as right; the first is the one to learn. Empty where the text has no answer.
        starts: position of the first character of each answer in the context.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A text with the summary that is wanted.

    Attributes:
        document: the text that the encoder is given.
        summary: the text that the decoder should write.
    """

    document: str
    summary: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """One sentence, or two, with the label that is wanted.

    Attributes:
        first: the sentence.
        second: the other one of a pair, or None.
        label: a class as it is written, or a number; see :mod:`dora_dist.data.encoding.classification`.
    """

    first: str
    second: str | None
    label: str | int | float


Sample = Pair | Instruction | Chat | Document


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt of an instruction, in the plain form that Alpaca made common."""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def rename_fields(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's names; columns that were named in ``fields`` lose their own."""
    taken = {*fields, *fields.values()}
    renamed = {name: value for name, value in row.items() if name not in taken}
    for name, own in fields.items():
        with suppress(KeyError):
            renamed[name] = value_at(row, own)
    return renamed


def under_format_names(row: Mapping[str, Any], fields: Mapping[str, str], prompt: str | None) -> dict[str, Any]:
    """The row under the format's names; with ``prompt``, just the prompt that it makes of the row, and the answer.

    Args:
        row: the row as it was found.
        fields: the format's name of a field -> the row's own, where they differ.
        prompt: template of the prompt, with names of fields in braces; None for the row's own prompt.

    Raises:
        RowFlaw: a field that the prompt names is missing, or neither text nor a number.
    """
    renamed = rename_fields(row, fields)
    if prompt is None:
        return renamed
    answer = {name: renamed[name] for name in ("completion",) if name in renamed}
    return {"prompt": fill_prompt(prompt, row), **answer}


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The field of this name, or what is at a path such as ``answers.text.0``.

    Raises:
        KeyError: there is none.
    """
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise KeyError(path) from None
    return value


def has_value_at(row: Mapping[str, Any], path: str) -> bool:
    """Whether :func:`value_at` finds something, which may be null."""
    try:
        value_at(row, path)
    except KeyError:
        return False
    return True


def fields_of(row: Mapping[str, Any], paths: Iterable[str]) -> set[str]:
    """The fields of a row in which names and paths lie; a field may have a name that looks like a path."""
    return {path if path in row else path.split(".")[0] for path in paths}


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, blank text, or lists and objects of these."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or (isinstance(value, str) and not value.strip())


def gives_context(value: object) -> bool:
    """Whether one of :data:`CONTEXT_FIELDS` holds something; false says that there is nothing."""
    return value is not False and not is_empty(value)


def names_in(prompt: str) -> list[str]:
    """Names and paths in the braces of a prompt, each once."""
    return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(prompt) if name is not None))


def fill_prompt(template: str, row: Mapping[str, Any]) -> str:
    """A prompt with fields of a row in the place of their names in braces.

    Raises:
        RowFlaw: a field is missing, or neither text nor a number.
    """
    text = ""
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is None:
            continue
        try:
            value = value_at(row, name)
        except KeyError:
            raise RowFlaw(name, f"is missing, which the prompt names; the row has {', '.join(sorted(row))}") from None
        if not isinstance(value, str | int | float):
            raise RowFlaw(name, f"must be text or a number for the prompt, got {shortened(value)}")
        text += str(value)
    return text


def shortened(value: object) -> str:
    """A value as an error message shows it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def texts_of_parts(content: list[Any], place: str) -> list[str]:
    """The texts of a message's content or thought in OpenAI's parts.

    Raises:
        RowFlaw: a part is no text.
    """
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowFlaw(
                f"{place}[{number}]",
                f"must be a part of text, {{type: text, text: ...}}, since no other is read, got {shortened(part)}",
            )
    return [part["text"] for part in content]


def joined_text(content: str | list[str]) -> str:
    """A content or thought as one text, to compare it by."""
    return content if isinstance(content, str) else "\n".join(content)
