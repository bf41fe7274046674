"""Tables of the sources: what became of their rows, and the lengths of their examples."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_dist.preview.selection import Pool

if TYPE_CHECKING:
    import numpy as np

    from dora_dist.data.mixture import Mixture
    from dora_dist.setup.run_data import RunData

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """A histogram bar: ``count`` examples with ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    count: int

    @property
    def label(self) -> str:
        return f"{self.low:,}-{self.high:,}" if self.high > self.low else f"{self.low:,}"


def table_of(pool: Pool, data: "RunData", mixture: "Mixture | None") -> list[tuple[str, ...]]:
    """Table of the sources: what became of their rows, and for a mixture their shares."""
    last = ("also trained on",) if mixture is None else ("a pass", "share")
    columns = (
        "source",
        "format",
        "rows",
        "examples",
        "tokens",
        "trained",
        "longest",
        "truncated",
        "dropped",
        "bad rows",
    )
    lines = [(*columns, *last)]
    rows = [(pool.sources[n].name, pool.sources[n].format, [n]) for n in pool.chosen]
    if len(rows) > 1:
        rows.append(("together", "", list(pool.chosen)))
    for name, row_format, numbers in rows:
        sources = [pool.sources[number] for number in numbers]
        total = Counter[str]()
        for source in sources:
            total.update({name: n for name, n in dataclasses.asdict(source.counts).items() if isinstance(n, int)})
        if mixture is None:
            last = (f"{sum(data.overlap[source.name] for source in sources):,}",)
        else:
            per_pass = sum(mixture.counts[number] for number in numbers)
            last = (f"{per_pass:,}", f"{per_pass / sum(mixture.counts):.1%}")
        figures = (
            f"{total['rows']:,}",
            f"{total['examples']:,}",
            f"{total['tokens']:,}",
            f"{total['trained_tokens'] / total['tokens']:.1%}",
            f"{max(int(source.lengths().max()) for source in sources):,}",
            *(f"{total[count]:,}" for count in ("truncated", "overlong", "bad")),
        )
        lines.append((name, row_format, *figures, *last))
    return lines


def left_out(pool: Pool, lengths: "np.ndarray", limit: int) -> list[str]:
    """Remarks on skipped or truncated rows, with the files that list them, and on examples that are too long."""
    remarks = [remark for number in pool.chosen for remark in pool.sources[number].remarks()]
    if longer := int((lengths > limit).sum()):
        remarks.append(f"{longer:,} of {len(lengths):,} examples are longer than data.max_length {limit:,}")
    return remarks


def describe_lengths(lengths: "np.ndarray") -> str:
    import numpy as np

    median, most, nearly = np.quantile(lengths, (0.5, 0.9, 0.99), method="higher")
    return (
        f"{len(lengths):,} examples: shortest {lengths.min():,}, median {median:,}, 90% up to {most:,}, 99% up to "
        f"{nearly:,}, longest {lengths.max():,}"
    )


def bins_of(lengths: "np.ndarray") -> list[Bin]:
    """About :data:`NUM_BINS` bins with a round width."""
    import numpy as np

    least, longest = int(lengths.min()), int(lengths.max())
    wanted = (longest - least + 1) / NUM_BINS
    width = next(n for power in range(12) for n in (10**power, 2 * 10**power, 5 * 10**power) if n >= wanted)
    edges = np.arange(least // width, longest // width + 2) * width
    counts = np.histogram(lengths, bins=edges - 0.5)[0]
    return [
        Bin(max(least, int(low)), min(longest, int(high) - 1), int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
