"""Answers on a terminal, or where it is none."""

import shutil
import sys
import textwrap

from dora_dist.console.text import visible

LEAST_WIDTH = 80
"""Columns of a terminal from which two answers fit side by side."""
GAP = " | "
TAB = 4
"""Columns of a tab."""


def terminal_width() -> int | None:
    """Columns of the terminal that is written to, or None if it is not one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def shown(text: str) -> str:
    """A text as it is printed: tabs as spaces, every line break as one, and what a terminal would obey escaped."""
    return visible(text.replace("\r\n", "\n").expandtabs(TAB))


def render(prompt: str, base: str, adapted: str, width: int | None) -> str:
    """Prompt and answers: in two columns where ``width`` allows it, otherwise one below the other."""
    prompt, base, adapted = (shown(text).strip() for text in (prompt, base, adapted))
    if width is None or width < LEAST_WIDTH:
        return f"--- prompt\n{prompt}\n--- base\n{base}\n--- adapter\n{adapted}\n"
    column = (width - len(GAP)) // 2
    left, right = _column("base", base, column), _column("adapter", adapted, column)
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    rows = [f"{a:<{column}}{GAP}{b}".rstrip() for a, b in zip(left, right, strict=True)]
    return "\n".join([*_wrapped(prompt, width), "", *rows, "=" * width, ""])


def _column(title: str, text: str, width: int) -> list[str]:
    return [title, "-" * width, *_wrapped(text, width)]


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
