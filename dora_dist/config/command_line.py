"""The words of a command line: its options, and the one YAML file that it may name.

The standard library only: ``dora-dist doctor`` reports an environment in which the parser's packages are missing.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each option in a command line, written as ``--name value`` or ``--name=value``."""
    for word, after in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            yield name.removeprefix("--"), value if equals else after


def config_file(arguments: Sequence[str]) -> Path | None:
    """The file that a command line passes as ``--config``, if there is one.

    Raises:
        ValueError: there are several, or no name follows the option.
    """
    files = [value for option, value in options(arguments) if option == "config"]
    if len(files) > 1:
        raise ValueError(
            f"{len(files)} configuration files are given ({', '.join(files)}), but a command takes one: write all keys "
            "into one file, or set some of them as --section.key value"
        )
    if files == [""]:
        raise ValueError("--config has no value: give a YAML file after it")
    return Path(files[0]) if files else None


def file_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--config FILE`` in front, so that every option overrides the file: to the parser, a later
    word overrides an earlier one.

    Raises:
        ValueError: see :func:`config_file`.
    """
    path = config_file(arguments)
    if path is None:
        return list(arguments)
    words = iter(arguments)
    others = []
    for word in words:
        if word == "--config":
            next(words)
        elif not word.startswith("--config="):
            others.append(word)
    return ["--config", str(path), *others]


def with_config_option(arguments: Sequence[str] | None) -> list[str]:
    """The arguments of a command with ``--config FILE``; the file may also be given alone as the first argument.

    Args:
        arguments: arguments of the command; None for ``sys.argv``.

    Raises:
        ValueError: see :func:`config_file`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    as_first = bool(arguments) and not arguments[0].startswith("-")
    given = ["--config", *arguments] if as_first else list(arguments)
    config_file(given)  # the parsers of most commands take the last of several in silence
    return given
