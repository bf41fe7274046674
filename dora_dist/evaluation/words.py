"""What ROUGE and SQuAD's F1 count as a word, in any script."""

import unicodedata
from functools import cache
from typing import Any

UNSPACED = (
    "CJK ",
    "IDEOGRAPHIC ",
    "HIRAGANA ",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
)
"""Beginnings of Unicode's names of the characters of scripts that are written without spaces between words."""
JOINERS = "\u200c\u200d"
"""Characters without a width, which may stand inside of a word."""


def spaced(text: str) -> str:
    """A text with spaces around each character of :data:`UNSPACED`, together with the marks that follow it."""
    if text.isascii():
        return text
    parts, ended = [], False
    for character in text:
        if _kind(character) == "M":
            parts.append(character)
            continue
        alone = _is_unspaced(character)
        if alone or ended:
            parts.append(" ")
        parts.append(character)
        ended = alone
    return "".join(parts)


def words_of(text: str) -> list[str]:
    """Words in lower case: letters, marks and digits of any script, and single characters of :data:`UNSPACED`."""
    plain = unicodedata.normalize("NFC", text.lower())
    kept = (character if _kind(character) in "LMN" else " " for character in plain if character not in JOINERS)
    return spaced("".join(kept)).split()


class RougeTokenizer:
    """Words for rouge-score's ``RougeScorer``, whose own tokenizer knows the letters a to z only. A word of these
    letters gets its stem (Porter's), as there; one with other letters stays as it is."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english: Any = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Words, or their stems, in order."""
        return [
            part for word in words_of(text) for part in (self._english.tokenize(word) if word.isascii() else [word])
        ]


@cache
def _kind(character: str) -> str:
    """First letter of a character's category in Unicode: L, M, N, P, S, Z or C."""
    return unicodedata.category(character)[0]


@cache
def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(UNSPACED)
