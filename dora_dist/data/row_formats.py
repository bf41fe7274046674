"""The formats that rows are written in: the fields of each, what a row says, and what encodes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dora_dist.config.tasks import CAUSAL_LM, TASKS
from dora_dist.data.encoding.classification import LabelledEncoder
from dora_dist.data.encoding.encoder import EncodingRules, RowEncoder, RowParser
from dora_dist.data.encoding.questions import QuestionEncoder
from dora_dist.data.encoding.summaries import SummaryEncoder
from dora_dist.data.encoding.text import TextEncoder
from dora_dist.data.reading.samples import (
    ROLES,
    Chat,
    Document,
    Instruction,
    Labelled,
    Pair,
    Question,
    RowFlaw,
    Sample,
    Summary,
    rename_fields,
    shortened,
)

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
MESSAGE_EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Fields of a message that are handed to the chat template as they are."""


def _text(row: Mapping[str, Any], field: str, optional: bool = False) -> str:
    value = row.get(field)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = "is missing" if field not in row else f"must be text, got {shortened(value)}"
        raise RowFlaw(field, found)
    return value


def _wanted(row: Mapping[str, Any], field: str) -> str:
    """Text to learn from."""
    value = _text(row, field)
    if not value.strip():
        raise RowFlaw(field, "is empty, so that there is nothing to learn from it")
    return value


def _alpaca(row: Mapping[str, Any]) -> Sample:
    return Instruction(_text(row, "instruction"), _text(row, "input", optional=True), _wanted(row, "output"))


def _prompt_completion(row: Mapping[str, Any]) -> Sample:
    return Pair(_text(row, "prompt"), _wanted(row, "completion"))


def _document(row: Mapping[str, Any]) -> Sample:
    return Document(_wanted(row, "text"))


def _labelled(row: Mapping[str, Any]) -> Labelled:
    second = None if row.get("sentence2") is None else _text(row, "sentence2")
    label = row.get("label")
    if not isinstance(label, str | int | float):
        raise RowFlaw(
            "label", "is missing" if "label" not in row else f"must be text or a number, got {shortened(label)}"
        )
    return Labelled(_wanted(row, "sentence1"), second, label)


def _messages(row: Mapping[str, Any]) -> Sample:
    return _chat(row, "messages", "role", "content", {role: role for role in ROLES})


def _sharegpt(row: Mapping[str, Any]) -> Sample:
    messages, system = row.get("conversations"), _text(row, "system", optional=True)
    if isinstance(messages, list) and messages and isinstance(messages[0], dict) and "role" in messages[0]:
        return _chat(row, "conversations", "role", "content", {role: role for role in ROLES}, system)
    return _chat(row, "conversations", "from", "value", SHAREGPT_ROLES, system)


def _chat(
    row: Mapping[str, Any], field: str, role_key: str, text_key: str, roles: Mapping[str, str], system: str = ""
) -> Chat:
    entries = row.get(field)
    if not isinstance(entries, list) or not entries:
        raise RowFlaw(field, f"must be a list of messages, got {shortened(entries)}")
    messages = [_message(entry, f"{field}[{n}]", role_key, text_key, roles) for n, entry in enumerate(entries)]
    if system and messages[0]["role"] == "system":
        raise RowFlaw("system", "is there beside a message of the system: keep one")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowFlaw(field, "has no message of the assistant, so that there is nothing to learn from it")
    return Chat(messages[: answers[-1] + 1], _tools(row), len(messages) - answers[-1] - 1)


def _message(entry: Any, place: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RowFlaw(place, f"must be a message with {role_key} and {text_key}, got {shortened(entry)}")
    role = entry.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise RowFlaw(f"{place}.{role_key}", f"must be one of {', '.join(roles)}, got {shortened(role)}")
    message = {name: entry[name] for name in MESSAGE_EXTRAS if entry.get(name)}
    calls = roles[role] == "assistant" and "tool_calls" in message
    if not (calls and entry.get(text_key) is None):
        text = entry.get(text_key)
        if not isinstance(text, str):
            raise RowFlaw(f"{place}.{text_key}", f"must be text, got {shortened(text)}")
        if roles[role] == "assistant" and not text.strip() and not calls:
            raise RowFlaw(f"{place}.{text_key}", "is empty, so that there is nothing to learn from it")
        message["content"] = text
    return {"role": roles[role], **message}


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowFlaw("tools", f"must be a list of JSON schemas, and cannot be read as JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowFlaw("tools", f"must be a list of JSON schemas, got {shortened(tools)}")
    return tools or None


def _squad(row: Mapping[str, Any]) -> Question:
    """As the Hub has SQuAD: ``answers`` is ``{text: [...], answer_start: [...]}``, two empty lists for no answer.

    An ``answer_start`` that is off by one would train nonsense without a word: every answer must stand where it is said
    to stand.
    """
    question, context = _wanted(row, "question"), _wanted(row, "context")
    answers = row.get("answers")
    if not isinstance(answers, dict) or not all(isinstance(answers.get(n), list) for n in ("text", "answer_start")):
        raise RowFlaw(
            "answers",
            f"must be {{text: [...], answer_start: [...]}}, with empty lists for none, got {shortened(answers)}",
        )
    texts, starts = answers["text"], answers["answer_start"]
    if len(texts) != len(starts):
        raise RowFlaw("answers", f"has {len(texts)} texts, but {len(starts)} starts: every answer needs both")
    for number, (text, start) in enumerate(zip(texts, starts, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise RowFlaw(f"answers.text[{number}]", f"must be text that is not empty, got {shortened(text)}")
        if type(start) is not int or start < 0:
            raise RowFlaw(f"answers.answer_start[{number}]", f"must be a number of at least 0, got {shortened(start)}")
        found = context[start : start + len(text)]
        if found != text:
            raise RowFlaw(
                f"answers.answer_start[{number}]",
                f"is {start}, but the context has {shortened(found)} there, not the answer {shortened(text)}",
            )
    return Question(question, context, tuple(texts), tuple(starts))


def _summary(row: Mapping[str, Any]) -> Summary:
    return Summary(_wanted(row, "document"), _wanted(row, "summary"))


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A way to write rows.

    Attributes:
        required: fields that a row must have; a format is detected by them.
        optional: fields that it also reads.
        parse: makes a sample of a row; raises :class:`RowFlaw`.
        encoder: makes examples of the samples.
        is_chat: whether every row is a conversation, which needs a chat template.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    parse: RowParser
    encoder: type[RowEncoder[Any, Any]] = TextEncoder
    is_chat: bool = False


FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(required=("messages",), optional=("tools",), parse=_messages, is_chat=True),
    "sharegpt": RowFormat(required=("conversations",), optional=("system", "tools"), parse=_sharegpt, is_chat=True),
    "alpaca": RowFormat(required=("instruction", "output"), optional=("input",), parse=_alpaca),
    "prompt_completion": RowFormat(required=("prompt", "completion"), parse=_prompt_completion),
    "text": RowFormat(required=("text",), parse=_document),
    "classification": RowFormat(
        required=("sentence1", "label"), optional=("sentence2",), parse=_labelled, encoder=LabelledEncoder
    ),
    "squad": RowFormat(required=("question", "context", "answers"), parse=_squad, encoder=QuestionEncoder),
    "summary": RowFormat(required=("document", "summary"), parse=_summary, encoder=SummaryEncoder),
}
"""By name; where a row fits several of a task, the first one is meant."""


def build_encoder(tokenizer: PreTrainedTokenizerBase, rules: EncodingRules) -> RowEncoder[Any, Any]:
    """The encoder of rows that are written in the format ``rules.format``.

    Raises:
        ValueError: the tokenizer or the rules do not fit the format.
    """
    row_format = FORMATS[rules.format]
    return row_format.encoder(tokenizer, rules, row_format.parse)


def tell_format(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    fields: Mapping[str, str],
    formats: Sequence[str] = TASKS[CAUSAL_LM].formats,
) -> str:
    """The format that the first rows of a source are written in.

    Args:
        rows: at least one.
        where: the source, for the message.
        fields: the format's name of a field -> the name that the rows have for it, where these differ.
        formats: names of :data:`FORMATS` that it may be, those of the task.

    Raises:
        ValueError: the fields of the rows fit no format.
    """
    renamed = [rename_fields(row, fields) for row in rows]
    for by_value in (True, False):  # a table has all its columns in every row, empty ones too
        fields_found = [{name for name, value in row.items() if not by_value or value is not None} for row in renamed]
        fitting = {name: sum(set(FORMATS[name].required) <= found for found in fields_found) for name in formats}
        most = next((name for name, count in fitting.items() if 2 * count >= len(rows)), None)
        if most or any(fitting.values()):
            return most or max(fitting, key=fitting.__getitem__)
    common = set.union(*map(set, renamed))
    wanted = "; ".join(f"{name} needs {', '.join(FORMATS[name].required)}" for name in formats)
    others = [name for name, layout in FORMATS.items() if name not in formats and set(layout.required) <= common]
    example = "{sentence1: text}" if "classification" in formats else "{prompt: question, completion: answer}"
    hint = f"; they would be {others[0]}, which is for another task" if others else ""
    found = ", ".join(sorted(common)) or "that all of its first rows have: none"
    raise ValueError(
        f"{where}: the fields {found} fit no known format ({wanted}){hint}; name yours in the fields of the source, "
        f"such as fields: {example}, and the columns of a table whose first line is no header"
    )
