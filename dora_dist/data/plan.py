"""What is trained when: examples in their order, put together into the rows of batches.

A plan is a function of the examples' lengths, their order and the size of a global batch, and of nothing else: not of
the number of ranks, of gradient accumulation, or of where a run was resumed.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

PACKING_WINDOW = 4096
"""Most examples among which those that fit together are looked for."""
SORTING_WINDOW = 32
"""Number of global batches whose examples are sorted by length together."""


@dataclass(frozen=True)
class TrainingPlan:
    """Rows in the order of training; a row is one example, or several that are packed together.

    Attributes:
        examples: indices of examples, int64, shape (examples in all,).
        starts: index in ``examples`` where each row starts, and where the last one ends, int64, shape (rows + 1,).
    """

    examples: np.ndarray
    starts: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        """The examples of a row."""
        return self.examples[int(self.starts[number]) : int(self.starts[number + 1])]

    def first(self, num_rows: int) -> "TrainingPlan":
        """The plan's first rows."""
        starts = self.starts[: num_rows + 1]
        return TrainingPlan(self.examples[: starts[-1]], starts)

    def digest(self) -> str:
        """SHA-256 of the plan."""
        return sha256(self.examples.tobytes() + self.starts.tobytes()).hexdigest()

    def row_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each row, given those of every example; int64, shape (rows,)."""
        sums = np.concatenate([[0], np.cumsum(lengths[self.examples])])
        rows: np.ndarray = sums[self.starts[1:]] - sums[self.starts[:-1]]
        return rows

    def padding_share(self, lengths: np.ndarray, rows_per_batch: int) -> float:
        """Share of padding in all tokens that are computed, where each micro-batch is padded to its longest row.

        Args:
            lengths: tokens of every example.
            rows_per_batch: rows of a micro-batch on one device.
        """
        rows = self.row_lengths(lengths)
        whole = len(rows) // rows_per_batch * rows_per_batch
        batches = rows[:whole].reshape(-1, rows_per_batch)
        computed = int(batches.max(axis=1).sum()) * rows_per_batch
        return 1 - int(batches.sum()) / computed if computed else 0.0


OrderOfLength = Callable[[int], np.ndarray]
"""Number of examples -> their indices in training order; a longer order begins with every shorter one."""


def plan_padded(order: np.ndarray) -> TrainingPlan:
    """One example a row."""
    return TrainingPlan(order, np.arange(len(order) + 1))


def plan_by_length(order: np.ndarray, lengths: np.ndarray, global_batch: int, seed: int) -> TrainingPlan:
    """One example a row, those of similar length together, in the same global batch and there side by side.

    Examples are sorted inside windows of :data:`SORTING_WINDOW` global batches, which then come in random order.
    """
    window = SORTING_WINDOW * global_batch
    arranged = order.copy()
    for number, start in enumerate(range(0, len(order), window)):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        cuts = [part[first : first + global_batch] for first in range(0, len(part), global_batch)]
        # A batch that is not full can only be the last one of all.
        full = len(part) // global_batch
        turns = [*np.random.default_rng((seed, 4, number)).permutation(full), *range(full, len(cuts))]
        arranged[start : start + window] = np.concatenate([cuts[turn] for turn in turns])
    return plan_padded(arranged)


class PackedOrder:
    """The endless order of examples, several of them in a row: best fit decreasing inside windows of the order.

    A pass over the data is cut into windows of about the same size, :data:`PACKING_WINDOW` at the most, so that a row
    never holds examples of two passes, and one pass has every example as often as the mixture says. Windows do not
    depend on each other. Each is packed once, however often it is asked for.

    Args:
        order_of: the order of the examples.
        per_pass: examples of a pass.
        lengths: tokens of every example, none above ``capacity``.
        capacity: tokens of a row.
        seed: decides the order of the rows in a window.
    """

    def __init__(self, order_of: OrderOfLength, per_pass: int, lengths: np.ndarray, capacity: int, seed: int) -> None:
        self._order_of = order_of
        self._per_pass = per_pass
        self._lengths = lengths
        self._capacity = capacity
        self._seed = seed
        # By number and size: a window at whose end the order is cut off is packed differently from the full one.
        self._packed: dict[tuple[int, int], TrainingPlan] = {}

    def num_rows(self, num_examples: int) -> int:
        """Number of rows that the first examples of the order fill."""
        return sum(window.num_rows for window in self._windows(num_examples))

    def plan(self, num_rows: int) -> TrainingPlan:
        """The first rows, from as many full windows as they take."""
        count = 1
        while (found := self.num_rows(self._end_of(count))) < num_rows:
            count = max(count + 1, -(-count * num_rows // found))
        return _joined(self._windows(self._end_of(count))).first(num_rows)

    def _end_of(self, count: int) -> int:
        """Number of examples in the first ``count`` windows."""
        per_pass = -(-self._per_pass // PACKING_WINDOW)
        passes, windows = divmod(count, per_pass)
        return passes * self._per_pass + windows * self._per_pass // per_pass

    def _windows(self, num_examples: int) -> list[TrainingPlan]:
        bounds = [0]
        while bounds[-1] < num_examples:
            bounds.append(min(self._end_of(len(bounds)), num_examples))
        keys = [(number, end - start) for number, (start, end) in enumerate(itertools.pairwise(bounds))]
        if missing := [key for key in keys if key not in self._packed]:
            order = self._order_of(num_examples)
            for number, size in missing:
                self._packed[number, size] = self._pack(number, order[bounds[number] : bounds[number + 1]])
        return [self._packed[key] for key in keys]

    def _pack(self, number: int, examples: np.ndarray) -> TrainingPlan:
        rows = _best_fit(examples, self._lengths, self._capacity)
        turns = np.random.default_rng((self._seed, 5, number)).permutation(len(rows))
        starts = np.cumsum([0, *(len(rows[turn]) for turn in turns)], dtype=np.int64)
        return TrainingPlan(np.concatenate([rows[turn] for turn in turns]).astype(np.int64), starts)


def _joined(plans: Sequence[TrainingPlan]) -> TrainingPlan:
    """The rows of several plans, one plan after the other."""
    sizes = np.concatenate([np.diff(plan.starts) for plan in plans])
    return TrainingPlan(np.concatenate([plan.examples for plan in plans]), np.concatenate([[0], np.cumsum(sizes)]))


def _best_fit(examples: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of the row, ascending
    longest_first = examples[np.argsort(-lengths[examples], kind="stable")]
    for example, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = bisect.bisect_left(room, (length, -1))
        if fitting < len(room):
            left, row = room.pop(fitting)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (left - length, row))
    return rows
