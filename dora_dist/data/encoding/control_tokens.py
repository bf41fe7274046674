"""Control tokens whose text stands in somebody's text, and how such a text is written as a text.

A tokenizer makes control tokens of their text, wherever it stands. A copy of the tokenizer knows them by other names,
of private characters: to the copy ``<|im_end|>`` is a text like others, and the token is what has the private name.
Names are as long as the tokens, so that characters keep their places.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LAST_PRIVATE = 0x10FFFD
"""The last character that Unicode gives no meaning; names take those before it, one each."""
MOST_NAMES = 60_000
"""Largest number of names: the last plane of Unicode has few more private characters."""
NO_TEXT = "which would be no text to the model but the start or the end of something"
NOT_WRITTEN = "which this tokenizer cannot write as plain text"
PROBE = "Text 1"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlTokens:
    """What becomes of control tokens in texts.

    Attributes:
        writer: the tokenizer that texts are encoded with.
        known: matches every control token.
        refused: matches what no text may hold.
        reason: why no text may hold it, in words.
        names: control token -> its name in what ``writer`` encodes, and the other way round; empty where it is the
            same.
    """

    writer: PreTrainedTokenizerBase
    known: re.Pattern[str]
    refused: re.Pattern[str]
    reason: str
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def as_text(self) -> bool:
        """Whether the text of a control token is written as plain text."""
        return bool(self.names)

    def exchanged(self, value: T) -> T:
        """A text, or all texts in lists and dictionaries, with control tokens and their names in each other's place.

        Applied to texts before they are rendered and to the rendering, it leaves the texts as they were, and gives the
        control tokens that the template has written their names.
        """

        def exchange(part: Any) -> Any:
            if isinstance(part, str):
                return self._named.sub(lambda found: self.names[found[0]], part)
            if isinstance(part, Mapping):
                return {exchange(name): exchange(entry) for name, entry in part.items()}
            return [exchange(entry) for entry in part] if isinstance(part, list) else part

        exchanged: T = exchange(value) if self.names else value
        return exchanged

    @cached_property
    def _named(self) -> re.Pattern[str]:
        return _alternatives(self.names)


def control_tokens(tokenizer: PreTrainedTokenizerBase, choice: str = "refuse") -> ControlTokens:
    """How a run treats control tokens in texts.

    Args:
        tokenizer: the model's tokenizer.
        choice: ``data.control_tokens``, ``refuse`` or ``text``.

    Raises:
        ValueError: they cannot be told from text with this tokenizer.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    known = _alternatives(special)
    if choice == "refuse" or not special:
        return ControlTokens(writer=tokenizer, known=known, refused=known, reason=NO_TEXT)
    if not tokenizer.is_fast or len(special) > MOST_NAMES:
        raise _cannot_write(tokenizer, "is not a fast one (tokenizer.json)")
    private = {token: chr(LAST_PRIVATE - number) * len(token) for number, token in enumerate(special)}
    writer = _renamed(tokenizer, private)
    control = {tokenizer.convert_tokens_to_ids(token) for token in special}
    encoded = writer(special, add_special_tokens=False)["input_ids"]
    lost = [token for token, ids in zip(special, encoded, strict=True) if not ids or control.intersection(ids)]
    characters = f"[{chr(LAST_PRIVATE - len(special) + 1)}-{chr(LAST_PRIVATE)}]"
    return ControlTokens(
        writer=writer,
        known=known,
        refused=re.compile("|".join([*map(re.escape, sorted(lost, key=len, reverse=True)), characters])),
        reason=NOT_WRITTEN,
        names={**private, **{name: token for token, name in private.items()}},
    )


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _cannot_write(tokenizer: PreTrainedTokenizerBase, reason: object) -> ValueError:
    return ValueError(
        f"data.control_tokens is text, but the tokenizer {type(tokenizer).__name__} cannot tell control tokens from "
        f"text ({reason}): set it to refuse"
    )


def _renamed(tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str]) -> PreTrainedTokenizerBase:
    """A copy with the same ids, which knows some tokens by other names.

    Raises:
        ValueError: the copy would encode texts to other ids, or not know the tokens.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    own = {role: names[token] for role, token in tokenizer.special_tokens_map.items() if str(token) in names}
    try:
        copy = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)),
            model_input_names=tokenizer.model_input_names,
            **own,
        )
    except Exception as error:  # its own kind, raised in Rust
        raise _cannot_write(tokenizer, error) from None
    for token, name in names.items():
        if copy(name, add_special_tokens=False)["input_ids"] != [tokenizer.convert_tokens_to_ids(token)]:
            raise _cannot_write(tokenizer, f"{token!r} has no name of its own")
    for texts in ({"text": PROBE}, {"text": PROBE, "text_pair": PROBE}, {"text_target": PROBE}):
        if copy(**texts)["input_ids"] != tokenizer(**texts)["input_ids"]:
            raise _cannot_write(tokenizer, "it puts tokens of its own around texts, in a way that cannot be copied")
    return copy
