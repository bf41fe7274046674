"""JSON of rows. Python's parser takes the last of several values of one key, and says nothing."""

import json
from collections.abc import Sequence
from typing import Any


def object_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values.

    Raises:
        ValueError: a key stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"the key {twice!r} stands twice in one object, and one of its values would be lost: keep one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=object_of)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, has a number of thousands of digits, or a key that stands twice in one object.
        RecursionError: it is nested thousands deep.
    """
    return _DECODER.decode(text)
