"""The ``data`` section: the sources of a run, how their rows are read, and in which shares they are mixed."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from dora_dist.config.checks import nearest, of_other_trainers, require
from dora_dist.config.tasks import FormatName

Format = Literal["auto", FormatName]
MOST_FOLDERS = 8
"""Bound on the folders that a source's name takes from its path to differ from others; paths need fewer."""
SHARE = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*%\s*")
"""A share of the training rows, as ``data.eval`` can be."""
ALMOST_A_SHARE = re.compile(r".*%|\d*\.?\d+", re.DOTALL)
"""Texts that ``data.eval`` takes for a misspelled share, and not for a file."""
LARGEST_SHARE = 50
"""Percent that a share must stay below, so that more is trained on than held out."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of examples: a mapping in data.train or data.eval, alone or in a list.

    Args:
        path: file (JSON, JSONL, CSV, TSV or TXT, also .gz; Parquet, Arrow), glob of files, folder that
            Dataset.save_to_disk wrote, or name on the Hub; or a list of files and globs.
        name: name in messages and metrics; null derives it from the path.
        format: row format; auto detects it from the fields of the first rows.
        fields: maps the format's name of a field to the name in the rows, such as {prompt: question}.
        ignore: fields of the rows that the model need not have, such as [context], for which a row would be refused.
        columns: column names of a CSV or TSV file that has no header line.
        quotes: whether quotation marks enclose fields of a CSV or TSV file; false takes them as characters, as GLUE's
            files need.
        text: rows of a .txt file: lines (one document a line), or whole (one document a file).
        as_chat: overrides data.as_chat for this source.
        prompt: overrides data.prompt for this source.
        system: overrides data.system for this source.
        subset: configuration (subset) of a data set on the Hub.
        split: split of a data set on the Hub, or of a saved folder with several; null for train.
        revision: commit or tag of a data set on the Hub.
        max_rows: number of rows to read, the first ones; null for all.
        max_examples: train on a random choice of at most this many examples; null for all.
        weight: share of this source in the mixture, up to a common factor; for all sources or for none.
        epochs: number of times its examples occur in one pass over the mixture (1.5 is possible).
    """

    path: str | list[str]
    name: str | None = None
    format: Format = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    quotes: bool = True
    text: Literal["lines", "whole"] | None = None
    as_chat: bool | None = None
    prompt: str | None = None
    system: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    max_rows: int | None = None
    max_examples: int | None = None
    weight: float | None = None
    epochs: float | None = None

    def check(self, where: str) -> None:
        """Refuse impossible values; called by the section that holds the source.

        Raises:
            ValueError: names the key.
        """
        for name in ("max_rows", "max_examples"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{where}.{name}", value, "be at least 1, or null for all")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{where}.{name}", value, "be positive")
        _check_prompt(self.prompt, f"{where}.prompt")
        if isinstance(self.path, str) and SHARE.fullmatch(self.path):
            raise ValueError(
                f"{where}.path is {self.path!r}, but must name a file: a share of the training rows stands alone, as "
                f"in data.eval: {self.path} (a file of this name is ./{self.path})"
            )


@dataclass(kw_only=True)
class DataConfig:
    """Instruction data: where it is, how its rows are read, and in which shares its sources are mixed.

    Args:
        train: file, glob, saved folder or Hub name to train on; a mapping with settings of its own ("A source" in
            docs/configuration.md); or a list of several of these.
        eval: held-out data, written as train is, each source also measured by itself; or a share of the rows of every
            training source, such as 5% (docs/data.md says which rows); null for none.
        format: row format of all sources that do not set their own: messages (role, content), sharegpt
            (conversations), alpaca (instruction, input, output), prompt_completion, text; for other tasks
            classification (sentence1, sentence2, label), squad (question, context, answers), summary (document,
            summary); auto detects it from the fields of the rows.
        labels: labels of the format classification: classes, or regression on numbers.
        chat_template: auto (the tokenizer's own, a bundled one where it has none), one of llama3, chatml, gemma,
            mistral, plain, or the path of a Jinja file.
        chat_template_kwargs: values for variables that the chat template reads, such as {enable_thinking: false}. They
            are saved with the adapter, as defaults of its template.
        as_chat: put rows of alpaca and prompt_completion into the chat template. With false, Alpaca's rows have its
            plain headings, and prompts stay as they are. Null is true where the tokenizer has a chat template, or other
            sources need one.
        prompt: template that builds the prompt from any fields of a row, such as "Summarise: {dialogue}"; a name may
            be a path (answers.text.0). The answer is the field completion, or the one that fields names for it.
        system: system message of all conversations that have none.
        train_on: assistant (every answer of a conversation), last (the last answer only), or everything.
        train_on_thoughts: whether thoughts of answers (reasoning_content, <think>...</think>) have a loss. With
            false, the loss of an answer begins after its thought.
        max_length: length limit of an example in tokens, prompt and answer together; for summaries, of the document.
        max_target_length: length limit of a summary in tokens.
        stride: number of tokens that neighbouring windows of a context longer than max_length share (squad).
        overlong: what happens to examples above max_length: error stops the run, drop skips and counts them, truncate
            cuts what comes before the answer.
        bad_rows: what happens to rows that cannot be used: error stops the run, skip skips and counts them.
        control_tokens: what happens to rows whose texts hold control tokens, such as <|im_end|>: refuse treats them as
            rows that cannot be used, text tokenizes the tokens as ordinary text.
        batching: padded (one example a row), packed (several examples a row, which cannot attend to each other), or
            by_length (one example a row, examples of similar length in one batch).
        temperature: mix sources in proportion to size ** (1 / temperature); null for their sizes, weights or epochs.
        cache_dir: folder of the encoded data, which all runs with the same data and settings share.
        workers: number of processes that encode; null for one per core, at most 8.

    Attributes:
        train_sources: the sources that ``train`` describes, with short forms spelled out and a name for each.
        eval_sources: the same for ``eval``; empty where there is no held-out data, or a share of the training rows.
        eval_share: share of the rows of every training source that is held out, between 0 and 0.5; None where ``eval``
            is no share.
    """

    train: str | dict[str, Any] | list[str | dict[str, Any]]
    eval: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    format: Format = "auto"
    labels: Literal["classes", "regression"] = "classes"
    chat_template: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    as_chat: bool | None = None
    prompt: str | None = None
    system: str | None = None
    train_on: Literal["assistant", "last", "everything"] = "assistant"
    train_on_thoughts: bool = True
    max_length: int = 2048
    max_target_length: int = 128
    stride: int = 128
    overlong: Literal["error", "drop", "truncate"] = "error"
    bad_rows: Literal["error", "skip"] = "error"
    control_tokens: Literal["refuse", "text"] = "refuse"
    batching: Literal["padded", "packed", "by_length"] = "padded"
    temperature: float | None = None
    cache_dir: str = ".cache/data"
    workers: int | None = None

    def __post_init__(self) -> None:
        require(self.max_length >= 2, "data.max_length", self.max_length, "be at least 2")
        require(self.max_target_length >= 2, "data.max_target_length", self.max_target_length, "be at least 2")
        require(self.stride >= 0, "data.stride", self.stride, "be at least 0")
        require(self.temperature is None or self.temperature > 0, "data.temperature", self.temperature, "be positive")
        require(self.workers is None or self.workers >= 1, "data.workers", self.workers, "be at least 1")
        _check_prompt(self.prompt, "data.prompt")
        for name, value in self.chat_template_kwargs.items():
            require(isinstance(name, str), "data.chat_template_kwargs", name, "have names of variables, as text")
            rule = "be text, a number, true, false, null, or lists and mappings of these"
            require(_is_plain(value), f"data.chat_template_kwargs.{name}", repr(value), rule)
        for key, given in (("data.train", self.train), ("data.eval", self.eval)):
            require(given not in ([], "", {}), key, given, "name a file, or several")
        # No fields: what is saved, compared and asked for on the command line is the configuration as it was given.
        self.eval_share = _share(self.eval)
        self.eval_sources = [] if self.eval is None or self.eval_share else _sources(self.eval, "data.eval")
        self.train_sources = _sources(self.train, "data.train")
        self._check_shares()
        self._check_held_out()

    def prompt_of(self, source: SourceConfig) -> str | None:
        """The prompt template for a source, its own or that of all; None where its rows have their prompts."""
        return self.prompt if source.prompt is None else source.prompt

    def system_of(self, source: SourceConfig) -> str:
        """The system message for conversations of a source that have none; empty where none is set."""
        return (self.system if source.system is None else source.system) or ""

    def _check_shares(self) -> None:
        sources = self.train_sources
        weighted = [source for source in sources if source.weight is not None]
        repeated = [source for source in sources if source.epochs is not None]
        given = [name for name, there in (("weight", weighted), ("epochs", repeated)) if there]
        given += ["temperature"] if self.temperature is not None else []
        if len(given) > 1:
            raise ValueError(f"data has {' and '.join(given)}, but they are different ways to mix sources: keep one")
        if weighted and len(weighted) < len(sources):
            missing = next(source for source in sources if source.weight is None)
            raise ValueError(
                f"{len(weighted)} of {len(sources)} sources in data.train have a weight, but {missing.path} has none: "
                "give it to all or to none"
            )

    def _check_held_out(self) -> None:
        """Refuse settings of the mixture in held-out sources, which are in none."""
        for number, source in enumerate(self.eval_sources):
            for name in ("max_examples", "weight", "epochs"):
                value = getattr(source, name)
                if value is not None:
                    raise ValueError(
                        f"data.eval[{number}].{name} is {value}, which has no effect: it is for sources of data.train. "
                        "Omit it; evaluation.max_examples limits the examples that are evaluated"
                    )


def _is_plain(value: object) -> bool:
    """Whether JSON can write a value."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _share(given: object) -> float | None:
    """The share in ``data.eval``, between 0 and 0.5; None where it names files."""
    if not isinstance(given, str):
        return None
    found = SHARE.fullmatch(given)
    if found is None:
        if ALMOST_A_SHARE.fullmatch(given.strip()):
            raise ValueError(f"data.eval is {given!r}, which is no share: write it as 5% or 0.5%")
        return None
    percent = float(found[1])
    within = 0 < percent < LARGEST_SHARE
    require(within, "data.eval", given, f"be more than 0% and less than {LARGEST_SHARE}%, or name held-out files")
    return percent / 100


def _check_prompt(prompt: str | None, key: str) -> None:
    if prompt is None:
        return
    try:
        parts = list(Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"{key} is {prompt!r}: {error}; write {{{{ and }}}} for braces that are text") from None
    named = [name for _, name, spec, conversion in parts if name and not spec and not conversion]
    if not named or len(named) < sum(name is not None for _, name, _, _ in parts):
        raise ValueError(f"{key} is {prompt!r}, but must name fields of the rows in braces, such as {{dialogue}}")


def _sources(given: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]], key: str) -> list[SourceConfig]:
    entries = given if isinstance(given, list) else [given]
    sources = [_source(entry, f"{key}[{number}]") for number, entry in enumerate(entries)]
    given_names = [source.name for source in sources if source.name is not None]
    for name in given_names:
        if given_names.count(name) > 1:
            raise ValueError(f"two sources of {key} are called {name!r}: give them different names")
    made = iter(_names_of([source.path for source in sources if source.name is None], given_names))
    return [dataclasses.replace(s, name=next(made)) if s.name is None else s for s in sources]


def _source(entry: str | Mapping[str, Any], where: str) -> SourceConfig:
    """One source, checked by itself: as a part of a union, its errors would be those of all the union's members."""
    if isinstance(entry, str):
        entry = {"path": entry}
    known = [field.name for field in dataclasses.fields(SourceConfig)]
    for name in entry:
        if name not in known:
            hint = of_other_trainers(name) or nearest(name, known)
            raise ValueError(f"unknown key {where}.{name}{hint} (a source has {', '.join(known)})")
    if "path" not in entry:
        raise ValueError(f"{where} has no path: give the file, glob, saved folder or Hub name of the source")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SourceConfig)
    try:
        source = SourceConfig(**parser.parse_object(dict(entry)).as_dict())
    except ArgumentError as error:
        raise ValueError(f"{where}: {error}") from None
    source.check(where)
    return source


def _names_of(paths: Sequence[str | list[str]], taken: Sequence[str]) -> list[str]:
    """Names that tell sources apart, as short as they can be: those of files, with as many folders before them as it
    takes; the same path again is numbered.

    Args:
        paths: path of each source.
        taken: names that other sources have been given.
    """
    found: list[str] = []
    for number, path in enumerate(paths):
        others = [other for place, other in enumerate(paths) if place != number]
        depths = (depth for depth in range(MOST_FOLDERS) if _name_of(path, depth) not in _names(others, depth, taken))
        name = _name_of(path, next(depths, 0))
        repeats = (f"{name}-{count}" for count in itertools.count(2))
        earlier = [*taken, *found]
        found.append(name if name not in earlier else next(new for new in repeats if new not in earlier))
    return found


def _names(paths: Sequence[str | list[str]], depth: int, taken: Sequence[str]) -> list[str]:
    return [*taken, *(_name_of(path, depth) for path in paths)]


def _name_of(path: str | list[str], depth: int) -> str:
    """``a/train.jsonl.gz`` -> ``train``, or with a folder ``a/train``."""
    first = Path(path if isinstance(path, str) else path[0])
    name = first.name.split(".")[0].replace("*", "") or "data"
    folders = [part for part in first.parts[:-1] if part not in ("/", ".", "..", "~")]
    return "/".join([*folders[len(folders) - min(depth, len(folders)) :], name])
