"""The values of a configuration as its author wrote them.

jsonargparse reads every text of a file as YAML a second time, which turns ``"no"`` into false and ``"3"`` into a
number. This module keeps quoted text as text.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import get_loader

from dora_dist.config.command_line import config_file, options

TRAINING = "training"
"""The section without a dataclass; the command line sets its keys one by one."""


def given_by(arguments: Sequence[str], keys: Iterable[str]) -> dict[str, Any]:
    """Values of keys as written in a command line and its file. Numbers and texts that the command line itself sets
    outside the section ``training`` are omitted: the parser does not change them.

    Args:
        arguments: the command line's arguments; its file must be readable.
        keys: dotted names of all keys of the configuration.
    """
    keys = list(keys)
    given: dict[str, Any] = {}
    try:
        if path := config_file(arguments):
            given = values_of(get_loader("yaml")(path.read_text(encoding="utf-8")), keys)
        for option, value in options(arguments):
            if option == TRAINING or option.startswith(f"{TRAINING}."):
                of_option = get_loader("yaml")(value)
                name = option.removeprefix(TRAINING).removeprefix(".")
                given[TRAINING] = {**(given.get(TRAINING) or {}), name: of_option} if name else of_option
            elif option in keys and isinstance(of_option := get_loader("yaml")(value), dict | list):
                given[option] = of_option
            elif option != "config":
                given = {key: value for key, value in given.items() if not f"{key}.".startswith(f"{option}.")}
    except yaml.YAMLError:
        return {}  # the parser reports the error
    return given


def values_of(nested: object, keys: Iterable[str]) -> dict[str, Any]:
    """Dotted key -> value, for the keys that are present."""
    found = {}
    for key in keys:
        value = nested
        for part in key.split("."):
            value = value.get(part, dataclasses.MISSING) if isinstance(value, Mapping) else dataclasses.MISSING
        if value is not dataclasses.MISSING:
            found[key] = value
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as a flat one with ``section.key`` names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def keep_text(parsed: Any, given: Mapping[str, Any], section: type) -> None:
    """Restore the given values where the parser has turned them into something else.

    Args:
        parsed: values by dotted key; changed in place.
        given: result of :func:`given_by`.
        section: dataclass of the configuration.

    Raises:
        ValueError: a number or a switch was given as quoted text.
    """
    for key, value in given.items():
        if isinstance(value, dict | list):
            if not isinstance(parsed[key], str) or _takes_nested(_hint_of(section, key)):
                parsed[key] = value
        elif isinstance(value, str) and parsed[key] != value:
            hint = _hint_of(section, key)
            if not _takes_text(hint, value):
                wanted = "true or false" if hint is bool else "a number"
                raise ValueError(f"{key} is the text {value!r}, but must be {wanted}: remove the quotation marks")
            parsed[key] = value


def _hint_of(section: type, key: str) -> Any:
    hint: Any = section
    for part in key.split("."):
        hint = get_type_hints(hint)[part]
    return hint


def _takes_nested(hint: Any) -> bool:
    """Whether a key may have a mapping or a list, and not only text that YAML could read as one."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(map(_takes_nested, get_args(hint)))
    return hint is Any or get_origin(hint) in (dict, list)


def _takes_text(hint: Any, text: str) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes_text(member, text) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return text in get_args(hint)
    return hint in (str, Any)
