"""What is trained when: examples in their order, put together into the rows of batches.

A plan is a function of the examples' lengths, their order and the size of a global batch, and of nothing else: not of
the number of ranks, of gradient accumulation, or of where a run was resumed.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

PACKING_WINDOW = 4096
"""Examples among which those that fit together are looked for."""
SORTING_WINDOW = 32
"""Global batches whose examples are sorted by length."""


@dataclass(frozen=True)
class TrainingPlan:
    """Rows in the order of training; a row is one example, or several that are packed together.

    Attributes:
        examples: indices of examples, int64, shape (examples in all,).
        starts: where in ``examples`` each row starts, and where the last one ends, int64, shape (rows + 1,).
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
"""How many examples -> their indices in training order; a longer order begins with every shorter one."""


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


def plan_packed(order: np.ndarray, lengths: np.ndarray, capacity: int, seed: int) -> TrainingPlan:
    """Several examples a row, of ``capacity`` tokens at most: best fit decreasing inside windows of the order.

    Args:
        order: indices of examples in training order.
        lengths: tokens of every example, none above ``capacity``.
        capacity: tokens of a row.
        seed: of the order of the rows in a window.
    """
    rows: list[list[int]] = []
    for number, start in enumerate(range(0, len(order), PACKING_WINDOW)):
        packed = _best_fit(order[start : start + PACKING_WINDOW], lengths, capacity)
        rows += [packed[turn] for turn in np.random.default_rng((seed, 5, number)).permutation(len(packed))]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return TrainingPlan(np.concatenate(rows).astype(np.int64), starts.astype(np.int64))


def _best_fit(examples: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of the row, ascending
    for example in examples[np.argsort(-lengths[examples], kind="stable")]:
        length = int(lengths[example])
        fitting = bisect.bisect_left(room, (length, -1))
        if fitting < len(room):
            left, row = room.pop(fitting)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(int(example))
        bisect.insort(room, (left - length, row))
    return rows


def packed_to(order_of: OrderOfLength, lengths: np.ndarray, capacity: int, seed: int, num_rows: int) -> TrainingPlan:
    """A packed plan of exactly ``num_rows`` rows, from as many examples as they take."""
    windows = 1
    while True:
        plan = plan_packed(order_of(windows * PACKING_WINDOW), lengths, capacity, seed)
        if plan.num_rows >= num_rows:
            return plan.first(num_rows)
        windows = max(windows + 1, -(-windows * num_rows // plan.num_rows))
