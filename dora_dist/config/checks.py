"""Checks of single values, with the message that a user needs."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing where no known name is near."""
    known = sorted(known)
    # The right key in the wrong section, before a similar one.
    near = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise a ``ValueError`` with name, value and rule where the rule does not hold."""
    if not holds:
        raise ValueError(f"{name} is {value}, but must {rule}")
