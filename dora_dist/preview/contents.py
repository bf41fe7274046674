"""Builds the content of a preview from the run's data."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.distributed.launcher import check_world_size
from dora_dist.preview.selection import ExampleSelection, Pool, build_pool, choose_examples
from dora_dist.preview.tables import Bin, bins_of, describe_lengths, left_out, table_of
from dora_dist.preview.tokens import Piece, split_tokens
from dora_dist.preview.training_order import TrainingOrder, build_course

if TYPE_CHECKING:
    from dora_dist.setup.run_data import RunData

UNLIMITED = 2**31 - 1
"""Replaces data.max_length when examples that are too long for the real value are shown."""


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """An example with its title."""

    title: str
    pieces: Sequence[Piece]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Everything that a preview shows.

    Attributes:
        title: title of the preview.
        note: description of how the examples were chosen.
        examples: examples, token by token.
        table: table of the sources, header first; the first two columns are words, the others numbers.
        lengths: summary of the lengths, in words.
        bins: histogram of the lengths.
        limit: ``data.max_length``.
        remarks: lines about rows that were skipped or truncated, and about the steps of the run.
    """

    title: str
    note: str
    examples: Sequence[ShownExample]
    table: Sequence[Sequence[str]]
    lengths: str
    bins: Sequence[Bin]
    limit: int
    remarks: Sequence[str]

    @property
    def most(self) -> int:
        """Number of examples in the fullest bin, at least 1."""
        return max([1, *(entry.count for entry in self.bins)])

    def limit_mark(self, number: int) -> str:
        """Label of a bin that contains the limit on lengths, or beyond which the limit is; otherwise empty."""
        entry, limit = self.bins[number], f"data.max_length {self.limit:,}"
        if entry.low <= self.limit <= entry.high:
            return limit
        if number == 0 and self.limit < entry.low:
            return f"{limit} is below all"
        return f"{limit} is above all" if number == len(self.bins) - 1 and self.limit > entry.high else ""


def build_preview(config: RunConfig, choice: ExampleSelection, world_size: int) -> Preview:
    """Read the data and build the preview.

    Args:
        config: the run's configuration.
        choice: the user's choice of examples.
        world_size: number of processes for which optimizer steps are counted.

    Raises:
        ValueError: the configuration or the input is invalid.
    """
    import numpy as np

    from dora_dist.setup.run_data import build_mixture

    check_world_size(world_size, config.distributed.engine)
    limit = config.data.max_length
    config, tokenizer, data, flaw = _read(config)
    mixture = build_mixture(config.data, data.train, config.seed, config.pruning.num_held_back)
    course = build_course(config, mixture, world_size, flaw)
    pool = build_pool(data, mixture, choice)
    examples = [
        _show(tokenizer, pool, index, None if choice.held_out else course, limit)
        for index in choose_examples(pool, course.examples, choice)
    ]
    lengths = pool.column(lambda source: source.lengths())[np.concatenate(pool.members)]
    return Preview(
        title=f"{'Held-out' if choice.held_out else 'Training'} data for {config.model.path}",
        note=_note(choice, examples, len(pool.chosen)),
        examples=examples,
        table=table_of(pool, data, None if choice.held_out else mixture),
        lengths=describe_lengths(lengths),
        bins=bins_of(lengths),
        limit=limit,
        remarks=[*data.notes, *left_out(pool, lengths, limit), *course.remarks],
    )


def _read(config: RunConfig) -> tuple[RunConfig, Any, "RunData", str]:
    """Configuration, tokenizer, data, and the error that training would stop with (or an empty string).

    With ``data.overlong: error``, examples that are too long stop a training, and are what the user wants to see. In
    that case all examples are encoded again without a limit, in the cache too.
    """
    from dora_dist.setup.run_data import read_data

    if config.task != CAUSAL_LM:
        raise ValueError(f"task is {config.task}, but the preview shows the trained tokens of {CAUSAL_LM} only")
    try:
        return config, *read_data(config), ""
    except ValueError as error:
        if config.data.overlong != "error" or "data.max_length" not in str(error):
            raise
        flaw = str(error)
    unlimited = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=UNLIMITED))
    return unlimited, *read_data(unlimited), flaw


def _note(choice: ExampleSelection, examples: Sequence[ShownExample], num_sources: int) -> str:
    """Describes which examples are shown."""
    if not examples:
        return "no example was truncated"
    which = "the longest" if choice.longest else "the first"
    which += " of those that were truncated" * choice.truncated
    if not choice.longest:
        which += " in the order of the files" if choice.held_out else " in the order of training"
        which += ", as many sources as there is room for" * (num_sources > 1 and not choice.truncated)
    joined = any(len(piece.ids) > 1 for example in examples for piece in example.pieces)
    hint = "; tokens that are text only together are shown as one" * joined
    return f"{len(examples)} example{'s' * (len(examples) > 1)}: {which}{hint}"


def _show(tokenizer: Any, pool: Pool, index: int, course: TrainingOrder | None, limit: int) -> ShownExample:
    """One example: its title and its tokens."""
    import numpy as np

    from dora_dist.data.encoding.encoder import IGNORED
    from dora_dist.data.encoding.text import labels_of

    first = pool.first()
    number = int(np.searchsorted(first, index, side="right")) - 1
    source = pool.sources[number]
    row = source.dataset[int(index - first[number])]
    ids = row["input_ids"]
    trained = [label != IGNORED for label in labels_of(ids, row["spans"])]
    parts = [f"{len(ids):,} tokens", f"{sum(trained):,} trained ({sum(trained) / len(ids):.1%})"]
    if row["removed"]:
        parts.append(f"truncated by {row['removed']:,} tokens")
    if len(ids) > limit:
        parts.append(f"{len(ids) - limit:,} tokens more than data.max_length")
    if course is not None and course.steps is not None:
        when = np.flatnonzero(course.examples == index)
        parts.append(f"first in optimizer step {course.steps[when[0]]:,}" if len(when) else "not reached by the run")
    return ShownExample(
        title=f"{source.name}, {row['place']}: {', '.join(parts)}", pieces=split_tokens(tokenizer, ids, trained)
    )
