"""Making what the model is given shorter, so that the answer fits."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dora_dist.data.reading.samples import Chat, Instruction, Pair, Sample


@dataclass(frozen=True)
class Shortener:
    """Takes text away from samples, never from their answers.

    Args:
        tokenizer: a fast one, which knows the place of tokens in a text.
    """

    tokenizer: PreTrainedTokenizerBase

    def with_less(self, sample: Sample, excess: int) -> Sample | None:
        """The sample without its oldest exchange, or with about ``excess`` tokens less in its longest given text."""
        if isinstance(sample, Pair):
            shorter = self._cut_middle(sample.prompt, excess)
            return None if shorter is None else replace(sample, prompt=shorter)
        if isinstance(sample, Instruction):
            for part in sorted(("context", "instruction"), key=lambda part: -len(getattr(sample, part))):
                shorter = self._cut_middle(getattr(sample, part), excess)
                if shorter is not None:
                    changed: dict[str, Any] = {part: shorter}
                    return replace(sample, **changed)
            return None
        assert isinstance(sample, Chat)
        users = [number for number, message in enumerate(sample.messages) if message["role"] == "user"]
        if len(users) > 1:
            return replace(sample, messages=sample.messages[: users[0]] + sample.messages[users[1] :])
        given = [number for number, message in enumerate(sample.messages) if message["role"] != "assistant"]
        if not given:
            return None
        for number in sorted(given, key=lambda number: -len(sample.messages[number].get("content", ""))):
            shorter = self._cut_middle(sample.messages[number].get("content", ""), excess)
            if shorter is not None:
                messages = list(sample.messages)
                messages[number] = {**messages[number], "content": shorter}
                return replace(sample, messages=messages)
        return None

    def _cut_middle(self, text: str, excess: int) -> str | None:
        """The text without about ``excess`` tokens from its middle, always shorter than before; None where so much
        cannot be cut."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        keep = max(len(offsets) - excess, 2)
        if keep >= len(offsets):
            return None
        end = offsets[keep // 2 - 1][1]
        # Several tokens may stand for the bytes of one character, and so for the same place in the text.
        start = max(offsets[len(offsets) - (keep - keep // 2) - 1][1], end + 1)
        shorter = text[:end] + text[start:]
        return shorter if len(shorter) < len(text) else None
