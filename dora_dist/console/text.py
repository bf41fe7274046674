"""Tables for people: what ``prepare``, the dry run and ``preview`` print of the sources."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], num_words: int = 2) -> str:
    """Columns of one width, header first: the first ``num_words`` to the left, the numbers after them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            f"{cell:<{width}}" if number < num_words else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in order: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
