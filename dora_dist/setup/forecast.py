"""Memory and time of a run that has not begun, for ``estimate`` and the dry run alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dora_dist.config.run import RunConfig
from dora_dist.config.training import length_of_run
from dora_dist.console.text import format_bytes, time_span
from dora_dist.data.prepared import PreparedSource
from dora_dist.memory import table
from dora_dist.memory.estimate import MemoryEstimate, estimate_memory
from dora_dist.runs.speed import Speed
from dora_dist.setup.recomputation import with_longest_row
from dora_dist.setup.run_data import build_mixture
from dora_dist.setup.training_arguments import count_steps


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Memory by the rows that a run has.

    Attributes:
        most: where all rows of a micro-batch are as long as can be.
        typical: where they have the median length; None where all rows are as long, or the data are not known.
        rows: which are as long as can be, in words.
    """

    most: MemoryEstimate
    typical: MemoryEstimate | None
    rows: str

    def render(self) -> str:
        """The table, and a line on the rows."""
        lines = [table.render(self.most), self.rows]
        if self.typical is not None:
            peak = format_bytes(self.typical.peak_bytes)
            lines.append(f"Rows of the median length, {self.typical.length:,} tokens: a peak of {peak}.")
        return "\n".join(lines)


def forecast_memory(
    config: RunConfig,
    world_size: int,
    device: str,
    train: Sequence[PreparedSource] | None,
    unread: str = "",
    card: int | None = None,
) -> MemoryForecast:
    """Memory of the longest row that there is, and of a typical one.

    Args:
        config: the run's configuration.
        world_size: number of ranks.
        device: see :func:`~dora_dist.memory.estimate.estimate_memory`.
        train: training sources; None where they are not known.
        unread: why they are not.
        card: see :func:`~dora_dist.memory.estimate.estimate_memory`.

    Raises:
        ValueError: see :func:`~dora_dist.memory.estimate.estimate_memory`.
    """

    whole = config if train is None else with_longest_row(config, train)
    most = estimate_memory(whole, world_size, device, card)
    if config.data.batching == "packed":
        return MemoryForecast(
            most=most, typical=None, rows=f"Rows are packed up to data.max_length, {most.length:,} tokens."
        )
    if train is None:
        rows = f"Rows of data.max_length, {most.length:,} tokens, because the data were not read: {unread}."
        return MemoryForecast(most=most, typical=None, rows=rows)
    median = int(np.median(np.concatenate([source.lengths() for source in train])))
    model = config.model
    if model.recompute_layers is not None:  # decided by the longest row, for all
        model = replace(model, recompute_layers=most.recomputation.count)
    typical = replace(config, model=model, data=replace(config.data, max_length=median))
    return MemoryForecast(
        most=most,
        typical=estimate_memory(typical, world_size, device, card),
        rows=f"Rows of the longest example, {most.length:,} tokens.",
    )


@dataclass(frozen=True, kw_only=True)
class TimeForecast:
    """How long a run takes at a known speed.

    Attributes:
        steps: optimizer steps of the run.
        tokens: number of their tokens, without padding.
        speed: speed of the run.
    """

    steps: int
    tokens: int
    speed: Speed

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.tokens / self.speed.tokens_per_second

    def render(self) -> str:
        """The time in words."""
        speed = self.speed.tokens_per_second
        return (
            f"Time: about {time_span(self.seconds)} for {self.steps:,} optimizer steps of {self.tokens:,} tokens in "
            f"all, at {speed:{',.0f' if speed >= 10 else '.2g'}} tokens/s ({self.speed.origin})."
        )


def forecast_time(
    config: RunConfig, memory: MemoryEstimate, train: Sequence[PreparedSource], speed: Speed
) -> TimeForecast:
    """The time of a run on data that are known, whatever this machine has.

    Args:
        config: the run's configuration.
        memory: estimate for the run, with its batches and ranks.
        train: training sources.
        speed: speed of the run.

    Raises:
        ValueError: the data do not fill one global batch.
    """
    mixture = build_mixture(config.data, train, config.seed, config.pruning.num_held_back)
    batch = memory.rows * memory.accumulation * memory.world_size
    steps = count_steps(mixture, *length_of_run(config.training), batch)
    tokens = int(mixture.plan(steps, batch).row_lengths(mixture.lengths).sum())
    return TimeForecast(steps=steps, tokens=tokens, speed=speed)
