"""The formats that rows are written in: the fields of each, what a row says, and what encodes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from dora_dist.config.tasks import CAUSAL_LM, TASKS
from dora_dist.data.encoding.classification import LabelledEncoder
from dora_dist.data.encoding.encoder import EncodingRules, RowEncoder
from dora_dist.data.encoding.questions import QuestionEncoder
from dora_dist.data.encoding.summaries import SummaryEncoder
from dora_dist.data.encoding.text import TextEncoder
from dora_dist.data.reading.row_json import parse_json
from dora_dist.data.reading.samples import (
    ALSO_CALLED,
    CHAT_FIELDS,
    CONTEXT_FIELDS,
    ROLES,
    THOUGHTS,
    UNTRAINED,
    WANTED,
    Chat,
    Document,
    Instruction,
    Labelled,
    Pair,
    Question,
    RowFlaw,
    Sample,
    Summary,
    fields_of,
    gives_context,
    is_empty,
    joined_text,
    names_in,
    rename_fields,
    shortened,
    texts_of_parts,
    under_format_names,
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
MESSAGE_EXTRAS = ("tool_call_id", "name")
"""Fields of a message that are handed to the chat template as they are."""
THOUGHT_FIELDS = (THOUGHTS, "thinking", "reasoning")
WEIGHT_FIELDS = ("weight", "train", "trainable", "loss")
"""Fields of a message that say whether it has a loss."""
MESSAGE_FIELDS = {*MESSAGE_EXTRAS, *THOUGHT_FIELDS, *WEIGHT_FIELDS, "tool_calls"}
REFUSED_MESSAGE_FIELDS = (
    *("function_call", "functions", "image", "images", "audio", "audios", "video", "videos"),
    *("prefix", "mask", "masked", "loss_mask"),
)
"""Fields of a message that mean something which is not read."""
ROW_MARKS = ("weight", "train", "trainable")
"""Fields of a row that say whether it has a loss, or how much of one."""


def _text(row: Mapping[str, Any], field: str, optional: bool = False) -> str:
    value = row.get(field)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise RowFlaw(field, _wrong(row, field, "must be text"))
    return value


def _wrong(row: Mapping[str, Any], field: str, rule: str) -> str:
    """Why a value cannot be used: it breaks the rule, or is missing, and then the names that are there show what it may
    be called."""
    if field in row:
        return f"{rule}, got {shortened(row[field])}"
    return f"is missing; there {'is' if len(row) == 1 else 'are'} {', '.join(map(repr, row)) or 'no fields'}"


def _wanted(row: Mapping[str, Any], field: str) -> str:
    """Text to learn from."""
    value = _text(row, field)
    if not value.strip():
        raise RowFlaw(field, "is empty, so that there is nothing to learn from it")
    return value


def _alpaca(row: Mapping[str, Any]) -> Sample:
    history = row.get("history") or []
    pairs = [tuple(entry) if isinstance(entry, list | tuple) else () for entry in history]
    if not isinstance(history, list) or not all(len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise RowFlaw("history", f"must be a list of [instruction, answer], got {shortened(history)}")
    for number, (_, answer) in enumerate(pairs):
        if not answer.strip():
            raise RowFlaw(f"history[{number}][1]", "is empty, so that there is nothing to learn from it")
    return Instruction(
        _text(row, "instruction"),
        _text(row, "input", optional=True),
        _wanted(row, "output"),
        _text(row, "system", optional=True),
        tuple((asked, answered) for asked, answered in pairs),
    )


def _prompt_completion(row: Mapping[str, Any]) -> Sample:
    return Pair(_text(row, "prompt"), _wanted(row, "completion"))


def _document(row: Mapping[str, Any]) -> Sample:
    return Document(_wanted(row, "text"))


def _labelled(row: Mapping[str, Any]) -> Labelled:
    second = None if row.get("sentence2") is None else _text(row, "sentence2")
    label = row.get("label")
    if not isinstance(label, str | int | float):
        raise RowFlaw("label", _wrong(row, "label", "must be text or a number"))
    return Labelled(_wanted(row, "sentence1"), second, label)


def _messages(row: Mapping[str, Any]) -> Sample:
    system = _text(row, "system", optional=True)
    return _chat(row, "messages", "role", "content", {role: role for role in ROLES}, system)


def asked_conversation(row: Mapping[str, Any]) -> Chat:
    """A row of the format ``messages`` without its last answer, which is to be given.

    Raises:
        RowFlaw: training would have refused the row.
    """
    system = _text(row, "system", optional=True)
    messages = _conversation(row, "messages", "role", "content", {role: role for role in ROLES}, system)
    return Chat(messages, _tools(row), options=_options(row))


def _sharegpt(row: Mapping[str, Any]) -> Sample:
    messages, system = row.get("conversations"), _text(row, "system", optional=True)
    if isinstance(messages, list) and messages and isinstance(messages[0], dict) and "role" in messages[0]:
        return _chat(row, "conversations", "role", "content", {role: role for role in ROLES}, system)
    return _chat(row, "conversations", "from", "value", SHAREGPT_ROLES, system)


def _chat(
    row: Mapping[str, Any], field: str, role_key: str, text_key: str, roles: Mapping[str, str], system: str = ""
) -> Chat:
    messages = _conversation(row, field, role_key, text_key, roles, system)
    answers = Chat(messages).answers()
    if not answers:
        raise RowFlaw(field, "has no message of the assistant to train, so that there is nothing to learn from it")
    unread = {name for entry in row[field] for name, value in entry.items() if value is not None}
    unread -= MESSAGE_FIELDS | {role_key, text_key}
    end = answers[-1] + 1
    return Chat(messages[:end], _tools(row), len(messages) - end, tuple(sorted(unread)), _options(row))


def _conversation(
    row: Mapping[str, Any], field: str, role_key: str, text_key: str, roles: Mapping[str, str], system: str
) -> list[dict[str, Any]]:
    entries = row.get(field)
    if not isinstance(entries, list) or not entries:
        raise RowFlaw(field, _wrong(row, field, "must be a list of messages"))
    messages = [_message(entry, f"{field}[{n}]", role_key, text_key, roles) for n, entry in enumerate(entries)]
    if not system or joined_text(_first_of_system(messages)).strip() == system.strip():
        return messages
    if messages[0]["role"] == "system":
        raise RowFlaw("system", "is there beside another message of the system: keep one")
    return [{"role": "system", "content": system}, *messages]


def _first_of_system(messages: Sequence[Mapping[str, Any]]) -> str | list[str]:
    """The message of the system that a conversation begins with; empty where it begins with another."""
    content: str | list[str] = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return content


def _message(entry: Any, place: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RowFlaw(place, f"must be a message with {role_key} and {text_key}, got {shortened(entry)}")
    role = entry.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise RowFlaw(f"{place}.{role_key}", _wrong(entry, role_key, f"must be one of {', '.join(roles)}"))
    for name in REFUSED_MESSAGE_FIELDS:
        if entry.get(name):
            raise RowFlaw(f"{place}.{name}", "is not read, so that it would be lost: leave it out of the rows")
    message = {"role": roles[role], **{name: entry[name] for name in MESSAGE_EXTRAS if entry.get(name)}}
    if calls := entry.get("tool_calls"):
        message["tool_calls"] = _calls(calls, f"{place}.tool_calls")
    is_answer = message["role"] == "assistant"
    message |= _thoughts(entry, place, is_answer)
    message |= _loss_marks(entry, place, is_answer)
    content = entry.get(text_key)
    if is_answer and calls and not content:
        return message
    if isinstance(content, list):
        content = texts_of_parts(content, f"{place}.{text_key}")
    elif not isinstance(content, str):
        raise RowFlaw(f"{place}.{text_key}", _wrong(entry, text_key, "must be text"))
    if is_answer and not "".join(content).strip() and UNTRAINED not in message:
        raise RowFlaw(f"{place}.{text_key}", "is empty, so that there is nothing to learn from it")
    return {**message, "content": content}


def _thoughts(entry: Mapping[str, Any], place: str, is_answer: bool) -> dict[str, Any]:
    """The thought of a message, under one name: a text, or a list of the texts of its parts."""
    found: dict[str, str | list[str]] = {}
    for name in THOUGHT_FIELDS:
        value = entry.get(name)
        if isinstance(value, list):
            value = texts_of_parts(value, f"{place}.{name}")
        elif value is not None and not isinstance(value, str):
            raise RowFlaw(f"{place}.{name}", f"must be text, got {shortened(value)}")
        if value:
            found[name] = value
    if not found:
        return {}
    (first, thought), *others = found.items()
    if not is_answer:
        raise RowFlaw(f"{place}.{first}", "is a thought in a message that is not the assistant's: leave it out")
    for name, other in others:
        if joined_text(other) != joined_text(thought):
            raise RowFlaw(f"{place}.{name}", f"is another thought than {first} of the same message: keep one")
    return {THOUGHTS: thought}


def _loss_marks(entry: Mapping[str, Any], place: str, is_answer: bool) -> dict[str, Any]:
    """What a message says of its own loss. A mark can only take a loss away: one that wants a loss for another role
    than the assistant's is kept so that it can be counted where the run does not train that role."""
    values = {name: entry[name] for name in WEIGHT_FIELDS if entry.get(name) is not None}
    for name, value in values.items():
        if value not in (0, 1):
            raise RowFlaw(f"{place}.{name}", f"must be 0 or 1, true or false, got {shortened(value)}")
    if any(value == 0 for value in values.values()):
        return {UNTRAINED: True}
    return {WANTED: next(iter(values))} if values and not is_answer else {}


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls of tools in one form: ``arguments`` as an object, whether they were one or JSON text."""
    if not isinstance(calls, list):
        raise RowFlaw(place, f"must be a list of calls, got {shortened(calls)}")
    found = []
    for number, call in enumerate(calls):
        here = f"{place}[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowFlaw(here, f"must be a call with a name and arguments, got {shortened(call)}")
        arguments = _from_json(function.get("arguments"), f"{here}.arguments")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise RowFlaw(f"{here}.arguments", f"must be an object with named values, got {shortened(arguments)}")
        others = {name: call[name] for name in ("id", "type") if call.get(name)}
        found.append({"type": "function", **others, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _from_json(value: Any, place: str, rule: str = "") -> Any:
    """A value that may be written as JSON text; None for blank text.

    Args:
        value: the value as it was found.
        place: where it stands, for the flaw.
        rule: what it must be, before the reason why it cannot be read.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowFlaw(place, f"{rule}cannot be read as JSON: {error}") from None


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = _from_json(row.get("tools"), "tools", "must be a list of JSON schemas, and ")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowFlaw("tools", f"must be a list of JSON schemas, got {shortened(tools)}")
    return tools or None


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Values for variables of the chat template; null counts as none, which tables have where a row has no key."""
    options = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if not isinstance(options, dict | None):
        raise RowFlaw("chat_template_kwargs", f"must be an object with named values, got {shortened(options)}")
    return {name: value for name, value in (options or {}).items() if value is not None}


def _squad(row: Mapping[str, Any]) -> Question:
    """A question as on the Hub: ``answers`` is ``{text: [...], answer_start: [...]}``, two empty lists for no answer.

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
        may_be_chat: whether a row can be put into a chat template, too.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    parse: Callable[[Mapping[str, Any]], Any]
    encoder: type[RowEncoder[Any, Any]] = TextEncoder
    is_chat: bool = False
    may_be_chat: bool = False

    @property
    def lost_fields(self) -> set[str]:
        """Fields that the model would be given, where they are read: those of other formats, and this one's own, which
        rows may have beside the field that is read in their place."""
        if self.encoder is not TextEncoder or self.parse is _document:
            return set()
        return {*CONTEXT_FIELDS, *self.optional}


FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(required=("messages",), optional=CHAT_FIELDS, parse=_messages, is_chat=True),
    "sharegpt": RowFormat(required=("conversations",), optional=CHAT_FIELDS, parse=_sharegpt, is_chat=True),
    "alpaca": RowFormat(
        required=("instruction", "output"), optional=("input", "system", "history"), parse=_alpaca, may_be_chat=True
    ),
    "prompt_completion": RowFormat(required=("prompt", "completion"), parse=_prompt_completion, may_be_chat=True),
    "text": RowFormat(required=("text",), parse=_document),
    "classification": RowFormat(
        required=("sentence1", "label"), optional=("sentence2",), parse=_labelled, encoder=LabelledEncoder
    ),
    "squad": RowFormat(required=("question", "context", "answers"), parse=_squad, encoder=QuestionEncoder),
    "summary": RowFormat(required=("document", "summary"), parse=_summary, encoder=SummaryEncoder),
}
"""Name -> format; where a row fits several of a task, the first one is meant."""


def parse_row(
    row: Mapping[str, Any],
    filled: bool,
    row_format: str,
    fields: Mapping[str, str],
    prompt: str | None,
    ignore: Sequence[str] = (),
) -> tuple[Any, list[str]]:
    """The sample that a row describes, and the names of its fields that are not read.

    Args:
        row: the row as it was found.
        filled: whether nulls in it may stand for keys that it never had.
        row_format: a name of :data:`FORMATS`.
        fields: the format's name of a field -> the row's own, where they differ.
        prompt: text with names of fields in braces, which is the row's prompt; None for its own.
        ignore: fields that are passed over.

    Raises:
        RowFlaw: the row describes none, or has something that would be lost.
    """
    layout = FORMATS[row_format]
    renamed = under_format_names(row, fields, prompt)
    try:
        sample = layout.parse(renamed)
        if filled and isinstance(sample, Chat):
            _check_filled(renamed, renamed[layout.required[0]], layout.required[0])
    except RowFlaw as error:
        raise RowFlaw(fields.get(error.field, error.field), error.reason) from None
    if layout.encoder is not TextEncoder:
        return sample, []
    read = [*read_fields(row_format, fields, prompt), *ignore]
    passed = fields_of(row, read)
    unread = {name: value for name, value in row.items() if name not in passed and not is_empty(value)}
    for name, value in unread.items():
        if name in layout.lost_fields and gives_context(value) and not _is_said_already(name, value, sample):
            way_out = _way_out(name, row, sample, row_format, fields, prompt)
            raise RowFlaw(name, f"is not read in rows of the format {row_format}, so that it would be lost: {way_out}")
        if name in ROW_MARKS and _mark(value) not in (None, 1):
            raise RowFlaw(
                name,
                f"is {shortened(value)}, which is not read for a whole row, so that it would be trained like any "
                f"other: leave the row out, or, where it says something else, set ignore: [{name}] for the source "
                "(messages have such marks of their own, sources a weight)",
            )
    return sample, [name for name, value in unread.items() if name not in ROW_MARKS or _mark(value) != 1]


def read_fields(row_format: str, fields: Mapping[str, str], prompt: str | None) -> list[str]:
    """Names and paths that are read of rows, by their own names.

    Args:
        row_format: a name of :data:`FORMATS`.
        fields: the format's name of a field -> the rows' own, where they differ.
        prompt: text with names of fields in braces, which is a row's prompt; None for its own.
    """
    if prompt is not None:
        return [fields.get("completion", "completion"), *names_in(prompt)]
    layout = FORMATS[row_format]
    return [fields.get(name, name) for name in (*layout.required, *layout.optional)]


def _is_said_already(name: str, value: Any, sample: Sample) -> bool:
    """Whether a field has the message of the system, which the row has in another place too."""
    said = ALSO_CALLED.get(name, name) == "system" and isinstance(value, str) and _system_of(sample)
    return bool(said) and said == value.strip()


def _system_of(sample: Sample) -> str:
    """The message of the system that a row has itself."""
    if isinstance(sample, Instruction):
        return sample.system.strip()
    return joined_text(_first_of_system(sample.messages)).strip() if isinstance(sample, Chat) else ""


def _way_out(
    name: str, row: Mapping[str, Any], sample: Sample, row_format: str, fields: Mapping[str, str], prompt: str | None
) -> str:
    """What to do with a field that is not read."""
    unneeded = f"set ignore: [{name}] for the source, if the model need not have it"
    known = ALSO_CALLED.get(name, name)
    if name == "chat_template_kwargs":
        return f"set data.chat_template_kwargs, which is for all rows, and ignore: [{name}] for the source"
    is_taken = known in (name, *fields) or (known == "system" and _system_of(sample))
    is_taken = is_taken or (known not in fields.values() and not is_empty(row.get(known)))
    if known in FORMATS[row_format].optional and not is_taken:
        return f"name it in the fields of the source, fields: {{{known}: {name}}}, or {unneeded}"
    is_pair = prompt is None and row_format == "prompt_completion"
    if is_pair and known in FORMATS["alpaca"].optional and name != "context":
        named = {"instruction": fields.get("prompt", "prompt"), "output": fields.get("completion", "completion")}
        listed = ", ".join(f"{wanted}: {own}" for wanted, own in {**named, known: name}.items() if wanted != own)
        others = f"fields: {{{listed}}}" if listed else "no fields"
        return f"read the rows as alpaca, with format: alpaca and {others} for the source, or {unneeded}"
    if (is_pair or prompt is not None) and isinstance(row[name], str):
        return f"write it into the prompt of the source, prompt: ... {{{name}}} ..., or {unneeded}"
    return unneeded


def _mark(value: Any) -> float | None:
    """A mark of a row as a number, also where a table has it as text; None where it is neither number nor switch."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_filled(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], field: str) -> None:
    """Refuse nulls where the model would be given them, or learn to write them.

    Args:
        row: the row, with calls and tools in forms that are read.
        messages: its messages.
        field: name of the field that has them.

    Raises:
        RowFlaw: there is one in the arguments of a call, in the tools, or in what the template is given.
    """
    found = {"tools": row.get("tools"), "chat_template_kwargs": _options(row)}
    for number, message in enumerate(messages):
        for place, call in enumerate(message.get("tool_calls") or ()):
            arguments = call.get("function", call).get("arguments")
            found[f"{field}[{number}].tool_calls[{place}].arguments"] = arguments or {}
    for name, value in found.items():
        if value is not None and (path := _path_of_null(value)) is not None:
            raise RowFlaw(
                name,
                f"has null at {path}, which may be a key that the row never had: Parquet, Arrow, saved folders and the "
                "Hub give all rows the same keys, and null where they have none; keep it as JSON text there",
            )


def _path_of_null(value: Any) -> str | None:
    """Path of the first null in a nested value; None where there is none."""
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        inner = "" if entry is None else _path_of_null(entry)
        if inner is not None:
            return f"{name}.{inner}".rstrip(".")
    return None


def what_is_said(
    row: Mapping[str, Any],
    filled: bool,
    row_format: str,
    fields: Mapping[str, str],
    prompt: str | None,
    ignore: Sequence[str] = (),
) -> Any:
    """What a row says, in lists and dictionaries of JSON: the same for rows that are read alike, whatever names their
    fields have, and in whichever format a prompt and its answer are written.

    Args:
        row: the row as it was found.
        filled: whether nulls in it may stand for keys that it never had.
        row_format: a name of :data:`FORMATS`.
        fields: the format's name of a field -> the row's own, where they differ.
        prompt: text with names of fields in braces, whose values are said without the words around them; None for the
            row's own.
        ignore: fields that are passed over.

    Raises:
        RowFlaw: the row cannot be read.
    """
    if prompt is not None:
        prompt = "\n\n".join(f"{{{name}}}" for name in names_in(prompt))
    sample, _ = parse_row(row, filled, row_format, fields, prompt, ignore)
    if isinstance(sample, Pair | Instruction):
        sample = sample.as_chat()
    if not isinstance(sample, Chat):
        return asdict(sample)
    messages = [
        {
            name: joined_text(part) if name in ("content", THOUGHTS) else part
            for name, part in message.items()
            if name not in (UNTRAINED, WANTED)
        }
        for message in sample.messages
    ]
    return [messages, sample.tools, *([sample.options] if sample.options else [])]


def build_encoder(tokenizer: PreTrainedTokenizerBase, rules: EncodingRules) -> RowEncoder[Any, Any]:
    """The encoder of rows that are written in the format ``rules.format``.

    Raises:
        ValueError: the tokenizer or the rules do not fit the format.
    """
    parse = partial(parse_row, row_format=rules.format, fields=rules.fields, prompt=rules.prompt, ignore=rules.ignore)
    return FORMATS[rules.format].encoder(tokenizer, rules, parse)


def _check_one_format(fits: Sequence[Sequence[str]], where: str) -> None:
    """Refuse rows of two formats: those of one would be refused, for fields that they need not have.

    Args:
        fits: formats that each row fits.
        where: the source, for the message.
    """
    known = [(number, names) for number, names in enumerate(fits, start=1) if names]
    if not known or set.intersection(*(set(names) for _, names in known)):
        return
    first, other = known[0], next((n, names) for n, names in known if known[0][1][0] not in names)
    raise ValueError(
        f"{where}: row {first[0]} is written as {first[1][0]}, row {other[0]} as {other[1][0]}: give rows of each "
        "format a source of their own, or set the format of the source and data.bad_rows to skip"
    )


def tell_format(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    fields: Mapping[str, str],
    formats: Sequence[str] = TASKS[CAUSAL_LM].formats,
) -> str:
    """The format that the first rows of a source are written in.

    Args:
        rows: the first rows, at least one.
        where: the source, for the message.
        fields: the format's name of a field -> the name that the rows have for it, where these differ.
        formats: names of :data:`FORMATS` that it may be, those of the task.

    Raises:
        ValueError: the fields of the rows fit no format.
    """
    renamed = [rename_fields(row, fields) for row in rows]
    for by_value in (True, False):  # a table has all its columns in every row, empty ones too
        fields_found = [{name for name, value in row.items() if not by_value or value is not None} for row in renamed]
        fits = [[name for name in formats if set(FORMATS[name].required) <= found] for found in fields_found]
        _check_one_format(fits, where)
        fitting = {name: sum(name in names for names in fits) for name in formats}
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
