"""Splits an example's tokens into pieces of text that can be shown."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOT_TEXT = "\N{REPLACEMENT CHARACTER}"
MOST_TOKENS = 8
"""Most tokens that are decoded together: a character has up to four bytes, and tokens may end inside one."""
CONTEXT = 4
"""Number of pieces before a token that are decoded with it, to see whether it begins with a space."""
BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token, or several tokens whose bytes are text only together.

    Attributes:
        text: displayed text.
        position: position of the first token in its example.
        ids: ids of the tokens.
        names: names of the tokens in the vocabulary.
        trained: whether the tokens have a loss.
        special: whether this is a control token or not text; ``text`` is then its name.
    """

    text: str
    position: int
    ids: tuple[int, ...]
    names: tuple[str, ...]
    trained: bool
    special: bool


def split_tokens(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
    """Split tokens into pieces, each with the text that it adds.

    Tokens that are text only together (the bytes of a character) become one piece. Bytes that never form text, and
    tokens without text, are shown by their names. Otherwise the pieces' texts together are the decoded text.

    Args:
        tokenizer: tokenizer of the ids.
        ids: ids of the tokens.
        trained: whether each token is trained; a piece never mixes both kinds.
    """
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    starts: list[int] = []  # starts of the pieces that the next one is decoded with
    first = 0
    while first < len(ids):
        end, text = _next_text(tokenizer, ids, names, trained, first, starts[-CONTEXT:])
        starts = [*starts, first] if text is not None else []
        pieces.append(
            Piece(
                text=text or _name_bytes(names[first]),
                position=first,
                ids=tuple(ids[first:end]),
                names=tuple(names[first:end]),
                trained=trained[first],
                special=ids[first] in control or not text,
            )
        )
        first = end
    return pieces


def _next_text(
    tokenizer: Any,
    ids: Sequence[int],
    names: Sequence[str],
    trained: Sequence[bool],
    first: int,
    context: Sequence[int],
) -> tuple[int, str | None]:
    """End and text of the piece that starts at ``first``; None for a token that is not text."""
    begin = context[0] if context else first

    def decode(end: int) -> str:
        text: str = tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    before = decode(first) if begin < first else ""
    for end in range(first + 1, min(first + MOST_TOKENS, len(ids)) + 1):
        if trained[end - 1] != trained[first]:
            break
        after = decode(end)
        text = after[len(before) :]
        # The text itself may contain the replacement character.
        if after.startswith(before) and (NOT_TEXT not in text or _is_text(names[first:end])):
            return end, text
    return first + 1, None


def _is_text(names: Sequence[str]) -> bool:
    try:
        b"".join(map(_bytes_of, names)).decode()
    except UnicodeDecodeError:
        return False
    return True


def _bytes_of(name: str) -> bytes:
    """The bytes that a token's name stands for."""
    if match := BYTE_NAME.fullmatch(name):
        return bytes([int(match[1], 16)])
    letters = _byte_letters()
    if all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return name.encode("utf-8", "surrogatepass")


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The alphabet of byte-level tokenizers (Radford et al. 2019): printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _name_bytes(name: str) -> str:
    """The name with ``<0xE4>`` for every byte that is not text."""
    if BYTE_NAME.fullmatch(name):
        return name
    text = _bytes_of(name).decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)
