"""Formats what commands print: remarks, tables, numbers with units."""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

MIB, GIB = 2**20, 2**30
IN_TEXTS = "\u200c\u200d\u3000\u00a0\u202f\u200e\u200f\u061c\u00ad"
"""Characters that Python calls unprintable, but that texts need: joiners of Persian and emoji, spaces of Chinese and
French, marks of Hebrew and Arabic, soft hyphens. Overrides and isolates, which put a line into another order, are not
among them."""
SHORT_ESCAPES = {"\r": "\\r", "\t": "⇥"}
_said = 0


def aligned(rows: Sequence[Sequence[str]], num_words: int = 2) -> str:
    """A table with aligned columns, header first: the first ``num_words`` columns left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            f"{cell:<{width}}" if number < num_words else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def first_lines(lines: Sequence[str], most: int, total: int | None = None) -> str:
    """Lines under a heading, each after a line break; only the first ones if there are many.

    Args:
        lines: all lines, or the first ``most``.
        most: largest number of lines that are shown.
        total: number of all lines; by default those given.
    """
    total = len(lines) if total is None else total
    shown = "".join(f"\n  {line}" for line in lines[:most])
    return shown + f"\n  and {total - most} more" * (total > most)


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as ranges, in order: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def is_first_rank() -> bool:
    """Whether the launcher has made this process the first rank; True without a launcher.

    For code outside a process group; inside one, use
    :attr:`~dora_dist.distributed.agreement.Agreement.is_first`.
    """
    return os.environ.get("RANK", "0") == "0"


def say(text: str, from_any_rank: bool = False) -> None:
    """Print a remark to the log: from the first rank only, or with ``from_any_rank`` from the rank it concerns."""
    global _said
    if from_any_rank or is_first_rank():
        sys.stderr.write(f"{escaped(text)}\n")
        sys.stderr.flush()
        _said += 1


def num_said() -> int:
    """Number of remarks that this process has printed so far."""
    return _said


def escaped(text: str) -> str:
    """The text of a message, with every character escaped that is invisible or that a terminal might obey; file names
    and data may hold such. Line breaks are kept. For texts that are to be read, see :func:`visible`."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def visible(text: str, marks: str = "") -> str:
    """The text with control characters and the like escaped, so that neither a terminal nor a browser obeys them.

    Args:
        text: any text; line breaks are kept.
        marks: characters with a special meaning in the output; they are escaped too.
    """
    if text.isprintable() and not any(mark in text for mark in marks):
        return text
    return "".join(character if character == "\n" else _visible(character, marks) for character in text)


def _visible(character: str, marks: str) -> str:
    if character in marks:
        return character.encode("ascii", "backslashreplace").decode()
    if character.isprintable() or character in IN_TEXTS:
        return character
    return SHORT_ESCAPES.get(character) or character.encode("unicode_escape", "surrogatepass").decode()


def rate(bytes_per_second: float) -> str:
    """A rate in decimal units, as makers of networks and disks count: ``12.3 GB/s``, ``450 MB/s``."""
    for unit, bytes_ in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= 0.9995 * bytes_:
            return f"{_digits(bytes_per_second / bytes_)} {unit}"
    return f"{_digits(bytes_per_second / 1e3)} kB/s"


def duration(seconds: float) -> str:
    """A duration with three digits: ``350 us``, ``12.3 ms``, ``4.20 s``."""
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * length:
            return f"{_digits(seconds / length)} {unit}"
    return f"{_digits(seconds / 1e-6)} us"


def time_span(seconds: float) -> str:
    """A time span in its largest two units: ``40 s``, ``3 min 20 s``, ``3 h 20 min``, ``2 d 4 h``."""
    for (large, length), (small, part) in pairwise({"d": 86_400, "h": 3_600, "min": 60, "s": 1}.items()):
        if seconds >= length:
            whole, rest = divmod(round(seconds / part), length // part)
            return f"{whole:,} {large}" + f" {rest} {small}" * bool(rest)
    return f"{seconds:.0f} s"


def format_bytes(count: int) -> str:
    """A size with about three digits: ``5.31 GiB``, ``812 MiB``, ``20.1 KiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if count >= 0.9995 * size:
            return f"{_digits(count / size)} {unit}"
    return f"{count} B"


def _digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
