"""The configuration on a command line."""

import sys
from collections.abc import Sequence

CONFIG_HELP = "YAML file of the run, which may also be the first argument by itself; see dora-dist recipe"


def with_config_option(arguments: Sequence[str] | None) -> list[str]:
    """The arguments of a command with ``--config FILE``, where the file may also be the first argument, by itself.

    Args:
        arguments: as given to the command; None for ``sys.argv``.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    as_first = bool(arguments) and not arguments[0].startswith("-")
    return ["--config", *arguments] if as_first else list(arguments)
