"""A resolved run, without its weights."""

from pathlib import Path

from dora_dist.config.parse import load_config
from dora_dist.config.run import RunConfig
from dora_dist.setup import resolve, run_data


def load(config: Path, *overrides: str) -> RunConfig:
    """The configuration of a run on one process."""
    return load_config(config, ["--distributed.engine", "none", *overrides])


def resolved(settings: RunConfig, card: int | None = None) -> resolve.ResolvedRun:
    """The resolved run, with its data read."""
    return resolve.resolve_run(settings, *run_data.read_data(settings), card=card)
