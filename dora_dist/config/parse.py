"""Reads a configuration from a YAML file and a command line, and explains what is wrong with it."""

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from dora_dist.config.checks import KINDS, alternatives, nearest, of_other_trainers
from dora_dist.config.command_line import config_file, file_first
from dora_dist.config.format_version import FORMAT_VERSION, refuse_later_format
from dora_dist.config.given import given_by, keep_text, values_of
from dora_dist.config.presets import PRESETS, given_preset, preset_of
from dora_dist.config.run import RunConfig
from dora_dist.config.training import owner_of

KIND_NAMES = {**{kind.__name__: words for kind, words in KINDS.items()}, "list[str]": "a list of texts"}
"""jsonargparse's names of types, in words."""


def build_parser() -> ArgumentParser:
    """The command line of ``dora_dist.train``: ``--config FILE`` and one option for every key."""
    parser = ArgumentParser(
        prog="dora-dist train",
        usage="%(prog)s CONFIG [--processes N] [--dry-run [--world-size N] [--tokens-per-second N]] "
        "[--section.key value ...]",
        description="Dynamic Low-Rank Adaptation (ACL 2024), not weight-decomposed DoRA. Starts one rank for each GPU, "
        "or --processes N; accelerate launch --config_file launch/X.yaml -m dora_dist.train --config CONFIG starts the "
        "same ranks. Every key of the YAML can be overridden as --section.key value. --dry-run checks all that can be "
        "checked without reading weights and starts no rank. It reports what the run would do on --world-size N ranks "
        "(by default those that this machine would start), and how long it would take at --tokens-per-second N.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of the run; it can also be given as the first argument"
    )
    parser.add_class_arguments(RunConfig)
    return parser


@cache
def _parser_of(preset: str) -> ArgumentParser:
    """A parser with the defaults of a preset. Cached: a comparison has hundreds of configurations, and building a
    parser takes a tenth of a second."""
    parser = build_parser()
    parser.set_defaults({"preset": preset, **PRESETS[preset]})
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> RunConfig:
    """Read the configuration from a command line.

    Args:
        arguments: command line, such as ``["--config", "configs/x.yaml", "--adapter.target_rank", "4"]``; None for
            ``sys.argv``.

    Raises:
        ValueError: unknown key (the message names the nearest one), wrong type, impossible value, unreadable file.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--training.")):
        # The parser would use it as the whole mapping, as text.
        whole, dot, _ = option.removeprefix("--training.").partition(".")
        if dot:
            raise ValueError(
                f"{option} is one entry of training.{whole}: give all entries in the file, or together as "
                f"--training.{whole} '{{name: value}}'"
            )
    return RunConfig(**parse_strictly(lambda: _parser_of(given_preset(arguments)), arguments, RunConfig))


def parse_strictly(
    make_parser: Callable[[], ArgumentParser], arguments: Sequence[str], section: type
) -> dict[str, Any]:
    """Values of a command line with ``--config FILE``, without ``config`` itself.

    Args:
        make_parser: makes the command's parser; called once the file is known to be readable.
        arguments: the command line's arguments.
        section: dataclass that the file describes; null values of its keys are refused where a value is required.

    Raises:
        ValueError: see :func:`parse_config`.
    """
    if path := config_file(arguments):
        _check_file(path, section)
    parser = make_parser()
    try:
        parsed = parser.parse_args(file_first(arguments))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), parser)) from None
    return _instances(parsed, given_by(arguments, _keys(parser)), section)


def _check_file(path: Path, section: type) -> None:
    """Refuse a command line's file that cannot be read, or names another one."""
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        raise ValueError(f"{what}: give a YAML file (dora-dist recipe prints some to start from)")
    values = _read(path)
    if isinstance(values, dict) and "config" in values:  # the parser would read it too, without these checks
        raise ValueError(f"{path}: config is {values['config']!r}, but there is one file: write its keys into this one")
    _refuse_repeated_keys(path)
    refuse_later_format(path, values)
    _refuse_nulls_and_bare_sections(path, values, section)


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """A run's configuration from values assembled by a program, checked as strictly as a file.

    Args:
        values: the values, nested as in the YAML.

    Raises:
        ValueError: see :func:`parse_config`.
    """
    entries = {entry.name: entry.type for entry in dataclasses.fields(RunConfig)}
    for name, value in values.items():
        if name not in entries:  # the parser would accept an empty section
            raise ValueError(f"unknown key {name}{_hint(name, set(entries))}")
        if (dataclasses.is_dataclass(entries[name]) or name == "training") and not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}, but must be a section of the configuration of a run")
    parser = _parser_of(preset_of(values))
    try:
        parsed = parser.parse_object(dict(values))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), parser)) from None
    return RunConfig(**_instances(parsed, values_of(values, _keys(parser)), RunConfig))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file with overrides on top; see :func:`parse_config`."""
    return parse_config(["--config", str(path), *overrides])


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to an equal one."""
    values = {**dataclasses.asdict(config), "format_version": FORMAT_VERSION}
    return str(yaml.safe_dump(values, sort_keys=False))


def _keys(parser: ArgumentParser) -> set[str]:
    """Dotted names of all keys."""
    return {key for key in vars(parser.get_defaults().as_flat()) if key != "config"}


def _instances(parsed: Any, given: Mapping[str, Any], section: type) -> dict[str, Any]:
    """The configuration's sections and values, with text as it was given."""
    keep_text(parsed, given, section)
    hints = get_type_hints(section)
    # Not parser.instantiate, which reads text in mappings as YAML again (jsonargparse 4.53).
    return {
        name: hints[name](**value.as_dict()) if dataclasses.is_dataclass(hints[name]) else value
        for name, value in vars(parsed).items()
        if name != "config"
    }


def _read(path: Path) -> object:
    """Values of a YAML file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}: write it as YAML, one `key: value` a line") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from None


def _refuse_repeated_keys(path: Path) -> None:
    """Refuse a key that appears twice: YAML silently takes the last one, and drops the others."""

    def check(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in seen:
                raise ValueError(f"{path}, line {key.start_mark.line + 1}: the key {name} appears twice")
            seen.add(name)
            check(value, f"{name}.")

    check(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), "")


def _refuse_nulls_and_bare_sections(path: Path, values: object, section: type) -> None:
    """Refuse keys without a value, which are null and which the parser accepts for any key of a file, and sections that
    are text, which the parser takes for the name of a file."""

    def check(values: object, section: type, prefix: str) -> None:
        hints = get_type_hints(section)
        for name, value in values.items() if isinstance(values, dict) else ():
            hint = hints.get(name)
            if hint is not None and value is None and type(None) not in get_args(hint):
                raise ValueError(f"{path}: {prefix}{name} is null, but must have a value: leave it out for its default")
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                if not isinstance(value, dict):
                    first = dataclasses.fields(hint)[0].name
                    raise ValueError(
                        f"{path}: {name} is {value!r}, but must be a section: indent its keys below it, such as "
                        f"{first}: ..."
                    )
                check(value, hint, f"{name}.")

    check(values, section, "")


def _hint(key: str, keys: set[str]) -> str:
    """A hint at the right name of an unknown key, or an empty string."""
    last = key.rsplit(".", 1)[-1]
    return of_other_trainers(key) or owner_of(last) or nearest(key, keys)


def _explain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message, with the nearest valid key if the key is unknown."""
    keys = _keys(parser)
    unknown = re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", message)
    if unknown:
        key = f"{unknown['group']}.{unknown['key']}"
        return f"unknown key {key}{_hint(key, keys)}"
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", message)
    if unknown:
        key = unknown[1] or unknown[2]
        return f"unknown key {key}{_hint(key, keys)}"
    word = re.search(r"unrecognized arguments: ([^\s-]\S*)", message)
    if word:
        return (
            f"{word[1]} belongs to no option: a command takes one YAML file, as its first argument or after --config, "
            "and every key as --section.key value"
        )
    section = re.search(r"^Parser key \"(\w+)\":\s+Unable to load config", message)
    if section:
        return f"--{section[1]} is a section: set its keys as --{section[1]}.KEY (dora-dist train --help lists them)"
    other = re.search(r"\"([\w.]+)\":\s+Expected a <class 'str'>\. Got value: ([^\n]*)$", message)
    if other:
        name, value = other[1], other[2]
        why = " (YAML takes no and off for false, yes and on for true)" if value in ("True", "False") else ""
        return f"{name} is {value.lower() if why else value}, but must be text: put it in quotation marks{why}"
    return _wrong_type(message) or message


def _wrong_type(message: str) -> str | None:
    """jsonargparse's message about a value of the wrong type, in words. None if it is another message, or a type has
    no words."""
    key = re.search(r"^(?:Parser key )?\"([\w.]+)\":", message)
    value = re.search(r"^ *(?:Expected [^\n]*\. Got|Given) value: ([^\n]*)$", message, re.MULTILINE)
    types = re.search(r"Subtypes: \[(.*)\]$|Expected an? (.*?)(?:\. Got value: [^\n]*)?$", message, re.MULTILINE)
    if not (key and value and types):
        return None
    wanted: list[str] = []
    kinds = r"typing\.Literal\[([^\]]*)\]|<class '(\w+)'>|(list\[str\]|dict)(?:\[[^\]]*\])?"
    for choices, plain, inner in re.findall(kinds, types[1] or types[2]):
        kind = plain or inner
        wanted += re.findall(r"'([^']*)'", choices) if choices else [KIND_NAMES.get(kind, "")]
    if not all(wanted) or not wanted:
        return None
    wanted.sort(key=lambda word: word == "null")  # versions of the parser differ in where it stands
    return f"{key[1]} is {value[1]}, but must be {alternatives(wanted)}"
