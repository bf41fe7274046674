"""What commands print: remarks, tables, numbers with units."""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

MIB, GIB = 2**20, 2**30
JOINERS = "\u200c\u200d\u3000"
"""Not printable to Python, but without them Persian, emoji and Chinese are not what they should be."""
SHORT_ESCAPES = {"\r": "\\r", "\t": "⇥"}
_said = 0


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


def is_first_rank() -> bool:
    """Whether this process is the first rank, as its launcher numbers them; True without a launcher.

    For what happens outside of a process group; inside of one,
    :attr:`~dora_dist.distributed.agreement.Agreement.is_first` says it.
    """
    return os.environ.get("RANK", "0") == "0"


def say(text: str, from_any_rank: bool = False) -> None:
    """A remark for the log, once: from the first rank only, or from whichever rank alone does what it is about."""
    global _said
    if from_any_rank or is_first_rank():
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()
        _said += 1


def num_said() -> int:
    """Remarks that this process has written so far."""
    return _said


def printable(text: str) -> str:
    """The text with control characters written out: file names and data hold some, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def visible(text: str, marks: str = "") -> str:
    """The text with control characters and the like written out, so that neither terminal nor browser obeys them.

    Args:
        text: any; line breaks are kept.
        marks: characters that mean something else where this is shown, to be written out too.
    """
    if text.isprintable() and not any(mark in text for mark in marks):
        return text
    return "".join(character if character == "\n" else _visible(character, marks) for character in text)


def _visible(character: str, marks: str) -> str:
    if character in marks:
        return character.encode("ascii", "backslashreplace").decode()
    if character.isprintable() or character in JOINERS:
        return character
    return SHORT_ESCAPES.get(character) or character.encode("unicode_escape", "surrogatepass").decode()


def rate(bytes_per_second: float) -> str:
    """As makers of networks and disks count: ``12.3 GB/s``, ``450 MB/s``."""
    for unit, bytes_ in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= 0.9995 * bytes_:
            return f"{_digits(bytes_per_second / bytes_)} {unit}"
    return f"{_digits(bytes_per_second / 1e3)} kB/s"


def duration(seconds: float) -> str:
    """``350 us``, ``12.3 ms``, ``4.20 s``."""
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * length:
            return f"{_digits(seconds / length)} {unit}"
    return f"{_digits(seconds / 1e-6)} us"


def time_span(seconds: float) -> str:
    """As a person would say it: ``40 s``, ``3 min 20 s``, ``3 h 20 min``, ``2 d 4 h``."""
    for (large, length), (small, part) in pairwise({"d": 86_400, "h": 3_600, "min": 60, "s": 1}.items()):
        if seconds >= length:
            whole, rest = divmod(round(seconds / part), length // part)
            return f"{whole:,} {large}" + f" {rest} {small}" * bool(rest)
    return f"{seconds:.0f} s"


def format_bytes(count: int) -> str:
    """Three digits or so: ``5.31 GiB``, ``812 MiB``, ``20.1 KiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if count >= 0.9995 * size:
            return f"{_digits(count / size)} {unit}"
    return f"{count} B"


def _digits(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
