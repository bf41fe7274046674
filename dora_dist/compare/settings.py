"""The configuration of a comparison: one YAML file, checked as strictly as that of a run."""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from dora_dist.compare.methods import BUILT_IN, Method, methods_of
from dora_dist.config.checks import require
from dora_dist.config.parse import parse_strictly

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(kw_only=True)
class AdaLoraSettings:
    """AdaLoRA's own settings; its ranks, scale and phases are those of the other methods.

    Args:
        orth_reg_weight: weight of the orthogonal regularizer, once per optimizer step (PEFT's default).
        beta1: smoothing of the sensitivity (PEFT's default).
        beta2: smoothing of the uncertainty (PEFT's default).
        interval: optimizer steps between two allocations; null for the run's pruning.interval.
    """

    orth_reg_weight: float = 0.5
    beta1: float = 0.85
    beta2: float = 0.85
    interval: int | None = None

    def __post_init__(self) -> None:
        require(self.orth_reg_weight >= 0, "adalora.orth_reg_weight", self.orth_reg_weight, "be at least 0")
        for name in ("beta1", "beta2"):
            require(0 < getattr(self, name) < 1, f"adalora.{name}", getattr(self, name), "lie in (0, 1)")
        require(self.interval is None or self.interval >= 1, "adalora.interval", self.interval, "be at least 1")

    def named(self) -> dict[str, Any]:
        """Values by their names in a comparison's configuration."""
        return {f"adalora.{name}": value for name, value in asdict(self).items()}


@dataclass(kw_only=True)
class CompareConfig:
    """Compare methods on the same data, order, steps, base and final number of adapter parameters.

    Args:
        output_dir: folder of the comparison: cells, table, pictures.
        run: configuration of a run as for dora_dist.train, common to all cells.
        tasks: name of each task and its own settings: sections of a run that override the common ones, where data.eval
            is the reported split; search, the split for choosing learning rates; parts, further held-out sources by
            name, whose figures are shown beside; metric, the compared held-out figure (loss by default); better: lower
            or higher (by default lower for losses, higher for others).
        methods: names of built-in methods, or {name: {from: a built-in one, adapter: ..., pruning: ...}}.
        budgets: target ranks.
        seeds: seeds of data order, adapter start and dropout; the same for all methods, whose results are paired by
            them.
        learning_rates: learning rates to choose from, the same for all methods.
        search_seeds: number of seeds, from the first, on which the learning rate is chosen.
        baseline: method that the others are compared with, seed by seed.
        alpha_over_rank: factor of the adapter's output, alpha / initial rank, the same for all methods.
        adalora: settings of PEFT's AdaLoRA.
    """

    output_dir: str
    run: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    budgets: list[int]
    seeds: list[int]
    learning_rates: list[float]
    methods: list[str | dict[str, Any]] = field(default_factory=lambda: list(BUILT_IN))
    search_seeds: int = 1
    baseline: str = "lora"
    alpha_over_rank: float = 2.0
    adalora: AdaLoraSettings = field(default_factory=AdaLoraSettings)

    def __post_init__(self) -> None:
        require(bool(self.output_dir.strip()), "output_dir", repr(self.output_dir), "name a folder")
        self.output_dir = os.path.expanduser(self.output_dir)
        for name in ("tasks", "methods", "budgets", "seeds", "learning_rates"):
            values = getattr(self, name)
            require(len(values) > 0, name, values, "not be empty")
            keys = [next(iter(value)) if isinstance(value, dict) and value else value for value in values]
            require(len(set(keys)) == len(keys), name, keys, "hold each entry once")
        for value in self.budgets:
            require(value >= 1, "budgets", self.budgets, "be ranks of at least 1")
        for rate in self.learning_rates:
            require(rate > 0, "learning_rates", self.learning_rates, "be positive")
        most = len(self.seeds)
        require(1 <= self.search_seeds <= most, "search_seeds", self.search_seeds, f"lie between 1 and {most} (seeds)")
        require(self.alpha_over_rank > 0, "alpha_over_rank", self.alpha_over_rank, "be positive")
        for name in (*self.tasks, *self.built_methods()):
            good = NAME.fullmatch(name) is not None
            require(
                good, "a name of a task or method", repr(name), "be letters, digits and _.+-, because it names a folder"
            )
        names = ", ".join(self.built_methods())
        require(self.baseline in self.built_methods(), "baseline", repr(self.baseline), f"be one of methods: {names}")

    def built_methods(self) -> dict[str, Method]:
        """The methods by name, in their order.

        Raises:
            ValueError: the description of a method is invalid.
        """
        return methods_of(self.methods)


def parse_compare(arguments: Sequence[str] | None = None) -> CompareConfig:
    """Read the configuration of a comparison from ``--config FILE`` and ``--key value`` on top of it.

    Raises:
        ValueError: the configuration is invalid; see :func:`~dora_dist.config.parse.parse_config`.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(CompareConfig)
    plain, nested = _split(sys.argv[1:] if arguments is None else arguments)
    config = CompareConfig(**parse_strictly(lambda: parser, plain, CompareConfig))
    for path, text in nested:
        _set(config, path, text)
    return config


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Arguments for the parser, and (key, value) pairs for ``run`` and ``tasks``. The parser would let the last such
    key replace its whole section."""
    plain: list[str] = []
    nested: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith(("--run.", "--tasks.")):
            plain.append(word)
            continue
        key, equals, rest = word.removeprefix("--").partition("=")
        value = rest if equals else next(words, None)
        if value is None:
            raise ValueError(f"--{key} has no value")
        nested.append((key, value))
    return plain, nested


def _set(config: CompareConfig, key: str, text: str) -> None:
    first, *sections, last = key.split(".")
    values = getattr(config, first)
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--{key} is given, but {section} is {values!r} and has no keys")
    values[last] = _value(text)


def _value(text: str) -> Any:
    """Reads a value as in a YAML file, but with 1e-3 as a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value
