"""Proof that a chat template writes what a conversation says: templates leave out what they do not know.

A conversation is rendered a second time with a word of its own in the place of every text, once for all conversations
of the same shape, and every word must be in that rendering. Each content and thought must also stand in its own
rendering, since some templates take texts apart.
"""

import json
import re
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dora_dist.data.reading.samples import THOUGHTS, Chat, RowFlaw

LEFT_OUT = (
    "is left out by the chat template, so that it would be lost: leave it out of the rows, or set data.chat_template"
)
LABELS = ("name", "tool_call_id")
"""Fields of messages that a template may leave out, which is counted."""
THOUGHT_TAGS = re.compile(r"</?think(?:ing)?>")


@dataclass
class ContentProof:
    """Checks conversations against one template.

    Args:
        render: the text of a conversation; raises :class:`RowFlaw` where the template refuses it.
    """

    render: Callable[[Chat], str]
    _missing: dict[Hashable, str] = field(default_factory=dict)
    _unwritten: dict[Hashable, list[str]] = field(default_factory=dict)

    def check(self, chat: Chat, text: str, answers: Collection[int]) -> None:
        """Check that contents, tools, calls, and the thoughts of some answers are in the rendering of a conversation.

        Args:
            chat: the conversation.
            text: its rendering.
            answers: numbers of the messages whose thoughts must be there, too; templates leave out those of earlier
                turns on purpose.

        Raises:
            RowFlaw: something is not there.
        """
        shape = (_shape(chat), tuple(answers))
        if shape not in self._missing:
            self._missing[shape] = self._first_missing(chat, answers)
        if self._missing[shape]:
            raise RowFlaw(self._missing[shape], LEFT_OUT)
        squeezed = _squeeze(text)
        for number, message in enumerate(chat.messages):
            content = message.get("content") or ""
            if message["role"] == "assistant" and number not in answers:
                content = THOUGHT_TAGS.split(content)[-1]
            if not _stands_in(content, squeezed):
                raise RowFlaw(f"messages[{number}].content", f"does not stand in its rendering: it {LEFT_OUT}")
            if number in answers and not _stands_in(message.get(THOUGHTS, ""), squeezed):
                raise RowFlaw(f"messages[{number}].{THOUGHTS}", f"does not stand in its rendering: it {LEFT_OUT}")

    def unwritten(self, chat: Chat) -> list[str]:
        """Which of ``name`` and ``tool_call_id`` the template does not write where a message has it, and of which role
        that message is, in words."""
        if not any(name in message for message in chat.messages for name in LABELS):
            return []
        shape = _shape(chat)
        if shape not in self._unwritten:
            self._unwritten[shape] = self._missing_labels(chat)
        return self._unwritten[shape]

    def _missing_labels(self, chat: Chat) -> list[str]:
        words = _Words()
        messages = [words.labels(message, number) for number, message in enumerate(chat.messages)]
        with suppress(RowFlaw):  # raised by a template that takes no such names
            text = self.render(replace(chat, messages=messages))
            missing = [(n, name) for (n, name), word in words.labelled.items() if word not in text]
            return list(dict.fromkeys(f"{name} of the role {messages[n]['role']}" for n, name in missing))
        return []

    def _first_missing(self, chat: Chat, answers: Collection[int]) -> str:
        words = _Words()
        messages = [words.message(message, number, answers) for number, message in enumerate(chat.messages)]
        tools = None if chat.tools is None else [words.tool(tool, f"tools[{n}]") for n, tool in enumerate(chat.tools)]
        text = self.render(replace(chat, messages=messages, tools=tools))
        return next((place for place, word in words.given.items() if word not in text), "")


@dataclass
class _Words:
    """Hands out words that stand in no text, and remembers where each was put."""

    given: dict[str, str] = field(default_factory=dict)
    labelled: dict[tuple[int, str], str] = field(default_factory=dict)
    _call_ids: dict[str, str] = field(default_factory=dict)

    def labels(self, message: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The message with words in the place of its name and of ids of calls, one word for one id, which has the nine
        characters that Mistral's templates ask for."""
        marked = dict(message)
        if "name" in message:
            marked["name"] = self.labelled[number, "name"] = f"qz{number}nzq"
        if "tool_call_id" in message:
            marked["tool_call_id"] = self.labelled[number, "tool_call_id"] = self._call_id(message["tool_call_id"])
        if "tool_calls" in message:
            calls = message["tool_calls"]
            marked["tool_calls"] = [{**c, "id": self._call_id(c["id"])} if "id" in c else c for c in calls]
        return marked

    def _call_id(self, own: Any) -> str:
        return self._call_ids.setdefault(str(own), f"qz{len(self._call_ids):05}zq")

    def new(self, place: str) -> str:
        self.given[place] = f"qz{len(self.given)}zq"
        return self.given[place]

    def message(self, message: Mapping[str, Any], number: int, answers: Collection[int]) -> dict[str, Any]:
        place, marked = f"messages[{number}]", dict(message)
        if message.get("content"):
            marked["content"] = self.new(f"{place}.content")
        if message.get(THOUGHTS) and number in answers:
            marked[THOUGHTS] = self.new(f"{place}.{THOUGHTS}")
        if "tool_calls" in message:
            calls = enumerate(message["tool_calls"])
            marked["tool_calls"] = [self._call(call, f"{place}.tool_calls[{n}]") for n, call in calls]
        return marked

    def _call(self, call: Mapping[str, Any], place: str) -> dict[str, Any]:
        arguments = {
            self.new(f"{place}.arguments.{name}"): self.new(f"{place}.arguments.{name}, its value")
            for name in call["function"]["arguments"]
        }
        return {**call, "function": {"name": self.new(f"{place}.name"), "arguments": arguments}}

    def tool(self, tool: Mapping[str, Any], place: str) -> dict[str, Any]:
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self._function(tool["function"], place)}
        return self._function(tool, place)

    def _function(self, function: Mapping[str, Any], place: str) -> dict[str, Any]:
        marked = dict(function)
        for name in ("name", "description"):
            if function.get(name):
                marked[name] = self.new(f"{place}.{name}")
        if properties := _properties(function):
            renamed = {name: self.new(f"{place}.parameters.{name}") for name in properties}
            required = [renamed.get(name, name) for name in function["parameters"].get("required", [])]
            inner = {"properties": {renamed[name]: schema for name, schema in properties.items()}, "required": required}
            marked["parameters"] = {**function["parameters"], **inner}
        return marked


def _properties(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _shape(chat: Chat) -> Hashable:
    """A key that is equal for conversations that differ in their texts only."""
    messages = tuple(
        (
            *((name, bool(value)) for name, value in sorted(message.items()) if name not in ("role", "tool_calls")),
            message["role"],
            *(len(call["function"]["arguments"]) for call in message.get("tool_calls", ())),
        )
        for message in chat.messages
    )
    return messages, json.dumps([chat.tools, chat.options], sort_keys=True)


def _squeeze(text: str) -> str:
    """A text without white space, which templates trim."""
    return "".join(text.split())


def _stands_in(content: str, squeezed: str) -> bool:
    """Whether a text is in a rendering: as it is, as a JSON string, or in parts, without the tags of thoughts."""
    if _squeeze(content) in squeezed or _squeeze(json.dumps(content, ensure_ascii=False)[1:-1]) in squeezed:
        return True
    return all(_squeeze(part) in squeezed for part in THOUGHT_TAGS.split(content))
