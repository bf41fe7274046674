"""Chat templates: which one, what it makes of a conversation, and which characters of it the assistant wrote."""

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dora_dist.data.encoding.control_tokens import ControlTokens, control_tokens
from dora_dist.data.encoding.proof import LEFT_OUT, ContentProof
from dora_dist.data.encoding.template_options import TemplateVariables, with_options
from dora_dist.data.reading.samples import THOUGHTS, UNTRAINED, WANTED, Chat, RowFlaw

BUNDLED = Path(__file__).parent / "templates"
FAMILIES = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "plain": (),
}
"""Bundled templates, with the tokens that a tokenizer must know for each; the first that fits is taken."""

PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PROBE_WORD = "qzword"


@dataclass(frozen=True)
class ChosenTemplate:
    """A Jinja template and where it comes from.

    Attributes:
        text: the template's Jinja source.
        origin: where it comes from, in words, for the log.
        bundled: whether it stands in for one that the tokenizer does not have.
    """

    text: str
    origin: str
    bundled: bool = False


def choose_template(
    tokenizer: PreTrainedTokenizerBase, wanted: str = "auto", options: Mapping[str, Any] | None = None
) -> ChosenTemplate:
    """The tokenizer's own template, a bundled one where it has none, or the one asked for.

    Args:
        tokenizer: the model's tokenizer.
        wanted: ``auto``, a name of :data:`FAMILIES`, or the path of a Jinja file.
        options: values for variables of the template, which become its defaults.

    Raises:
        ValueError: there is no such template, the tokenizer lacks a token that it needs, or the template never reads
            such a variable.
    """
    chosen = _found_template(tokenizer, wanted)
    return replace(chosen, text=with_options(chosen.text, options or {}, tokenizer.special_tokens_map))


def _found_template(tokenizer: PreTrainedTokenizerBase, wanted: str) -> ChosenTemplate:
    if wanted == "auto":
        if tokenizer.chat_template:
            return ChosenTemplate(tokenizer.get_chat_template(), "the tokenizer's own chat template")
        known = tokenizer.get_vocab()
        wanted = next(name for name, tokens in FAMILIES.items() if all(token in known for token in tokens))
        return ChosenTemplate(
            _bundled(wanted), f"the tokenizer has no chat template: taking the bundled one for {wanted}", bundled=True
        )
    if wanted in FAMILIES:
        missing = [token for token in FAMILIES[wanted] if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"data.chat_template is {wanted}, but the tokenizer does not know {', '.join(missing)}: take a "
                "template that fits the model, such as auto or plain"
            )
        return ChosenTemplate(_bundled(wanted), f"the bundled chat template for {wanted}")
    path = Path(wanted).expanduser()
    if not path.is_file():
        raise ValueError(
            f"data.chat_template is {wanted!r}, but must be auto, one of {', '.join(FAMILIES)}, or the path of a Jinja "
            f"file (looked from {Path.cwd()})"
        )
    return ChosenTemplate(path.read_text(encoding="utf-8"), f"the chat template in {path}")


def _bundled(name: str) -> str:
    return (BUNDLED / f"{name}.jinja").read_text(encoding="utf-8")


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False) if as_text else function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


@dataclass(frozen=True)
class CallStyle:
    """How a template wants calls of tools.

    Attributes:
        as_text: whether arguments are JSON text instead of an object.
        empty: what stands for the content of a message that has calls only: None, or an empty text.
    """

    as_text: bool
    empty: str | None


class ChatRenderer:
    """Renders conversations and knows which characters are the assistant's.

    An answer begins where the rendering of all before it, with the generation prompt, ends: there generation begins,
    too. So a template's own ``{% generation %}`` marks decide nothing, and the text of a message is never searched for.

    Args:
        tokenizer: the model's, a fast one (with offsets); templates read its special tokens.
        template: the template's Jinja source.
        controls: what becomes of control tokens in contents; None for contents that have none. Where they are text,
            those that the template itself writes stand in a rendering under their names in ``controls.writer``.

    Attributes:
        end_of_turn: the token that ends an answer.
        ends: :attr:`end_of_turn`, and the token that ends calls of tools where that is another one.

    Raises:
        ValueError: the template ends the assistant's turn without a control token, so that a model could not learn
            where to stop, or it cannot be rendered at all.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, controls: ControlTokens | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} cannot say which characters a token stands for, as chat "
                "templates need: convert it to a fast one (tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.template = template
        self._controls = control_tokens(tokenizer) if controls is None else controls
        self._proof = ContentProof(self.render)
        self.end_of_turn = self._find_end_of_turn()
        self.ends = self._find_ends()

    def render(self, chat: Chat, length: int | None = None, prompt: bool = False) -> str:
        """The conversation, or its first ``length`` messages, as text.

        Args:
            chat: the conversation.
            length: number of messages to render; None for all.
            prompt: whether to end with the generation prompt, which makes the assistant speak.

        Raises:
            RowFlaw: the template refuses these messages, or never reads what it is given beside them.
        """
        messages = [self._as_template_reads(message) for message in chat.messages[:length]]
        return self._render(messages, chat.tools, prompt, self._options(chat))

    def _options(self, chat: Chat) -> dict[str, Any]:
        """The values that a conversation gives to variables of this template. A switch, a number or an empty value may
        go unread; a text or a list that does is refused, since it would be lost."""
        options = {}
        for name, value in chat.options.items():
            if name not in self._variables.read and (isinstance(value, bool | int | float) or not value):
                continue
            if flaw := self._variables.flaw(name, value):
                raise RowFlaw(f"chat_template_kwargs.{name}", flaw)
            options[name] = value
        return options

    @cached_property
    def _variables(self) -> TemplateVariables:
        return TemplateVariables(self.template, self.tokenizer.special_tokens_map)

    def asked(self, chat: Chat) -> str:
        """A conversation that is to be answered, as text that ends with the generation prompt.

        Raises:
            RowFlaw: the template refuses these messages or leaves out a part of them.
        """
        chat = self.joined(chat)
        text = self.render(chat, prompt=True)
        self._proof.check(chat, text, ())
        return text

    def unwritten(self, chat: Chat) -> list[str]:
        """Fields of messages that may be left out of the rendering, and are (see :meth:`ContentProof.unwritten`), and
        switches that the template never reads."""
        given = [name for name, value in chat.options.items() if value not in ("", [], {})]
        unread = [f"chat_template_kwargs.{name}" for name in given if name not in self._variables.read]
        return [*self._proof.unwritten(chat), *unread]

    def spans(self, chat: Chat, last_only: bool = False) -> tuple[str, list[tuple[int, int]]] | None:
        """The rendered conversation with start and end of the characters of every answer that is trained.

        Args:
            chat: the conversation.
            last_only: whether to take the last answer only.

        Returns:
            Text and spans; None where the template renders an earlier turn otherwise once more messages follow (it
            leaves out thoughts, say), so that no single text has all turns as the model would see them.

        Raises:
            RowFlaw: the template refuses these messages or leaves out a part of them.
        """
        text = self.render(chat)
        answers = chat.answers()[-1:] if last_only else chat.answers()
        spans = []
        for number in answers:
            span = self.turn(chat, number, text)
            if span is None:
                if number == len(chat.messages) - 1:
                    if all(message["role"] == "system" for message in chat.messages[:number]):
                        raise RowFlaw(
                            f"messages[{number}]",
                            "is an answer before anything is asked, which this template does not render after its "
                            "generation prompt: set weight: 0 on it, so that it is given and not trained, or leave it "
                            "out",
                        )
                    raise RowFlaw(
                        "messages",
                        "is rendered so that the assistant's last turn does not go on from the template's generation "
                        "prompt: give the answer what that prompt begins (a thought, say), or set data.chat_template "
                        "to another template",
                    )
                return None
            spans.append(span)
        self._proof.check(chat, text, answers)
        return text, spans

    def turn(self, chat: Chat, number: int, text: str) -> tuple[int, int] | None:
        """Start and end of the characters of an answer; None where the template renders it otherwise once more messages
        follow.

        Args:
            chat: the conversation.
            number: index of a message of the assistant.
            text: the rendered conversation.

        Raises:
            RowFlaw: the template refuses these messages.
        """
        before = self.render(chat, number, prompt=True)
        after = text if number == len(chat.messages) - 1 else self.render(chat, number + 1)
        found = text.startswith(before) and text.startswith(after) and len(after) > len(before)
        return (len(before), len(after)) if found else None

    def last_span(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """:meth:`spans` of the last turn, which every template has."""
        found = self.spans(chat, last_only=True)
        assert found is not None
        return found

    def _as_template_reads(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message under the names and in the forms that this template reads."""
        own = (THOUGHTS, UNTRAINED, WANTED, "tool_calls")
        read = {name: value for name, value in message.items() if name not in own}
        if THOUGHTS in message:
            read[self._thoughts_key] = message[THOUGHTS]
        if "tool_calls" in message:
            style = self._call_style
            if style is None:
                raise RowFlaw("messages", f"holds calls of tools: this {LEFT_OUT}")
            read["tool_calls"] = [_with_arguments(call, style.as_text) for call in message["tool_calls"]]
            read.setdefault("content", style.empty)
        return read

    def joined(self, chat: Chat) -> Chat:
        """The conversation with one text in the place of the parts of a content or thought: joined as the template
        joins parts of contents, or, where it reads texts only, by a line break, as vLLM's server joins them for such a
        template."""
        messages = [
            {
                name: self._between_parts.join(part)
                if name in ("content", THOUGHTS) and isinstance(part, list)
                else part
                for name, part in message.items()
            }
            for message in chat.messages
        ]
        return replace(chat, messages=messages)

    @cached_property
    def _between_parts(self) -> str:
        parts = [{"type": "text", "text": f"{PROBE_WORD}{number}"} for number in range(2)]
        with suppress(RowFlaw):
            text = self._render([{**PROBE[0], "content": parts}, PROBE[1]], None, False)
            first, last = (text.find(part["text"]) for part in parts)
            between = text[first + len(parts[0]["text"]) : last]
            if 0 <= first < last and not between.strip():
                return between
        return "\n"

    @cached_property
    def _thoughts_key(self) -> str:
        for key in (THOUGHTS, "thinking", "reasoning"):
            with suppress(RowFlaw):
                if PROBE_WORD in self._render([PROBE[0], {**PROBE[1], key: PROBE_WORD}], None, False):
                    return key
        return THOUGHTS

    @cached_property
    def _call_style(self) -> CallStyle | None:
        """The first way to give a call that the template writes unescaped, and not as Python does; None without any."""
        arguments = {PROBE_WORD: "qzvalue", "qzmore": {"qzinner": [True]}}
        call = {"type": "function", "id": "qz1234567", "function": {"name": "qzname", "arguments": arguments}}
        function = {"name": "qzname", "description": "d", "parameters": {"type": "object", "properties": {}}}
        for as_text, empty in itertools.product((False, True), (None, "")):
            answer = {"role": "assistant", "content": empty, "tool_calls": [_with_arguments(call, as_text)]}
            with suppress(RowFlaw):
                text = self._render([PROBE[0], answer], [{"type": "function", "function": function}], False)
                is_there = all(word in text for word in ("qzname", PROBE_WORD, "qzvalue", "qzinner"))
                if is_there and not any(spoilt in text for spoilt in ("'qzinner'", '\\"qzinner', "True", "None")):
                    return CallStyle(as_text, empty)
        return None

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[Any] | None,
        prompt: bool,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        given: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self._controls.exchanged(options or {})}
        try:
            rendered: Any = render_jinja_template(  # returns a pair, though transformers says a text
                conversations=[self._controls.exchanged(list(messages))],
                tools=self._controls.exchanged(tools),
                chat_template=self.template,
                add_generation_prompt=prompt,
                **given,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RowFlaw("messages", f"is refused by the chat template: {error}") from None
        texts: list[str] = rendered[0]
        return self._controls.exchanged(texts[0])

    def _find_end_of_turn(self) -> int:
        try:
            text, found = self._controls_in_answer(Chat(PROBE))
        except RowFlaw as flaw:
            try:  # a generation prompt may begin a thought, from which only an answer with one goes on
                text, found = self._controls_in_answer(Chat([PROBE[0], {**PROBE[1], THOUGHTS: "c"}]))
            except RowFlaw:
                raise ValueError(f"the chat template cannot be used: {flaw}") from None
        if not found:
            raise ValueError(
                f"the chat template ends the assistant's turn without a control token ({text[-40:]!r}), so that the "
                "model could not learn where to stop: set data.chat_template to one that does"
            )
        return found[-1]

    def _find_ends(self) -> list[int]:
        """The token that ends a turn, and one that ends calls, where it is another and stands nowhere else in them."""
        call = {"type": "function", "id": "qz1234567", "function": {"name": "f", "arguments": {"x": "y"}}}
        for calls in ([call, call], [call]):  # some templates take one at a time
            with suppress(RowFlaw):
                _, found = self._controls_in_answer(Chat([PROBE[0], {"role": "assistant", "tool_calls": calls}]))
                alone = bool(found) and found.count(found[-1]) == 1 and self.end_of_turn not in found
                return [self.end_of_turn, found[-1]] if alone else [self.end_of_turn]
        return [self.end_of_turn]

    def _controls_in_answer(self, chat: Chat) -> tuple[str, list[int]]:
        """The rendering of a conversation, and the added tokens of the last answer in it, except white space; none
        where text follows the last of them.

        Raises:
            RowFlaw: the template refuses it.
        """
        text, spans = self.last_span(chat)
        encoded = self._controls.writer(text, add_special_tokens=False, return_offsets_mapping=True)
        added = self.tokenizer.added_tokens_decoder
        found = [
            (token, end)
            for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if end > spans[0][0] and token in added and not added[token].content.isspace()
        ]
        is_end = bool(found) and not text[found[-1][1] :].strip()
        return text, [token for token, _ in found] if is_end else []


def writes_date(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes the time of its rendering, so that a conversation is another text on another day."""
    clock = f"{{% macro strftime_now(format) %}}{PROBE_WORD}{{% endmacro %}}"
    with suppress(RowFlaw):
        return PROBE_WORD in ChatRenderer(tokenizer, clock + template).render(Chat(PROBE))
    return False


def stop_tokens(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[int]:
    """Tokens that end an answer: the end token, and those of turns where answers were trained in a chat template."""
    ends = {tokenizer.eos_token_id, *([] if template is None else ChatRenderer(tokenizer, template).ends)}
    return sorted(ends - {None})
