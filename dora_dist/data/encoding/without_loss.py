"""Characters of a rendered conversation that have no loss, though they lie in what is trained.

They are found by rendering the conversation once more, with a word of its own in the place of the text that is looked
for: the text itself may stand anywhere else, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dora_dist.data.encoding.proof import THOUGHT_TAGS
from dora_dist.data.reading.samples import THOUGHTS, Chat, RowFlaw

WORD = "qzwherezq"
"""The word in the place of a text."""

Span = tuple[int, int]
"""Start and end (excluded) of characters."""


@dataclass(frozen=True)
class WithoutLoss:
    """Finds the characters of a conversation that have no loss.

    Args:
        render: the text of a conversation; raises :class:`RowFlaw` where the template refuses it.
    """

    render: Callable[[Chat], str]

    def thought(self, chat: Chat, number: int, text: str, start: int) -> Span:
        """The thought of an answer: all that stands before its content, or its calls. Empty where the answer has none,
        and the template writes no empty one.

        Args:
            chat: the conversation.
            number: index of the answer.
            text: the rendered conversation.
            start: first character of the answer.

        Raises:
            RowFlaw: there is nothing but the thought, or it cannot be told from what follows.
        """
        place, message = f"messages[{number}].content", chat.messages[number]
        content = message.get("content") or ""
        tags = list(THOUGHT_TAGS.finditer(content))
        if tags and "/" not in tags[-1][0]:
            raise RowFlaw(place, f"begins a thought with {tags[-1][0]} and does not end it")
        said = content[tags[-1].end() if tags else 0 :].lstrip()
        if not said and not message.get("tool_calls"):
            raise RowFlaw(place, "is nothing but a thought, which has no loss under data.train_on_thoughts: false")
        before, _ = self._around(chat, number, content[: len(content) - len(said)])
        if not text.startswith(before) or len(before) < start:
            raise RowFlaw(place, "is rendered so that the end of its thought cannot be told: set data.chat_template")
        thinks = tags or message.get(THOUGHTS) or THOUGHT_TAGS.search(before, start)
        return (start, len(before) if thinks else start)

    def content(self, chat: Chat, number: int, text: str) -> Span:
        """The content of a message.

        Args:
            chat: the conversation.
            number: index of the message.
            text: the rendered conversation.

        Raises:
            RowFlaw: it cannot be told from the rest.
        """
        before, after = self._around(chat, number, "")
        start, end = len(before), len(text) - len(after)
        if not (text.startswith(before) and text.endswith(after) and start <= end):
            raise self._nowhere(number)
        return start, end

    def _around(self, chat: Chat, number: int, kept: str) -> tuple[str, str]:
        """The rendering before and after a word that stands for what follows the kept part of a content."""
        messages = list(chat.messages)
        messages[number] = {**messages[number], "content": kept + WORD}
        before, *after = self.render(replace(chat, messages=messages)).split(WORD)
        if len(after) != 1:
            raise self._nowhere(number)
        return before, after[0]

    def _nowhere(self, number: int) -> RowFlaw:
        reason = "is rendered so that its place cannot be told: set data.chat_template"
        return RowFlaw(f"messages[{number}].content", reason)
