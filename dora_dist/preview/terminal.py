"""Renders a preview for the terminal, or as plain text."""

import itertools
from collections.abc import Iterator, Sequence

from dora_dist.console.text import aligned, visible
from dora_dist.preview.contents import Preview
from dora_dist.preview.tokens import Piece

BAR_LENGTH = 40
BLOCKS = " ▏▎▍▌▋▊▉█"
RESET, BOLD, FAINT = "\x1b[0m", "\x1b[1m", "\x1b[2m"
SHADES = {
    False: ("\x1b[38;5;252;48;5;236m", "\x1b[38;5;252;48;5;240m"),
    True: ("\x1b[30;48;5;114m", "\x1b[30;48;5;78m"),
}
"""Styles of untrained and trained tokens, two each: neighbouring tokens alternate between them."""
MARKS = "⟦⟧│↵⇥"
"""Marks without colour: around trained tokens, between tokens, before a line break. Escaped where they are text."""


def render(preview: Preview, colour: bool) -> str:
    """The preview for a terminal, or without colour as plain text."""
    bold, end = (BOLD, RESET) if colour else ("", "")
    said = (
        f"{SHADES[True][0]}trained{RESET} {SHADES[False][0]}not trained{RESET}"
        if colour
        else "⟦trained│tokens⟧, not trained│tokens, ↵ line break"
    )
    blocks = [f"{bold}{visible(preview.title)}{end}\n{visible(preview.note)}; {said}"]
    body = _coloured if colour else _plain
    blocks += [f"{bold}{visible(example.title)}{end}\n{body(example.pieces)}" for example in preview.examples]
    blocks += [
        aligned([[visible(cell) for cell in row] for row in preview.table]),
        "\n".join([f"lengths of {preview.lengths}", *_bars(preview)]),
        "\n".join(map(visible, preview.remarks)),
    ]
    return "\n\n".join(blocks)


def _coloured(pieces: Sequence[Piece]) -> str:
    parts = []
    for number, piece in enumerate(pieces):
        style = SHADES[piece.trained][number % 2] + BOLD * piece.special
        # Without a reset, the background would extend to the end of the line.
        text = visible(piece.text).replace("\n", f"{FAINT}↵{RESET}\n{style}")
        parts.append(f"{style}{text}{RESET}")
    return "".join(parts)


def _plain(pieces: Sequence[Piece]) -> str:
    runs = []
    for trained, run in itertools.groupby(pieces, key=lambda piece: piece.trained):
        text = "│".join(visible(piece.text, MARKS).replace("\n", "↵\n") for piece in run)
        runs.append(f"⟦{text}⟧" if trained else text)
    return "".join(runs)


def _bars(preview: Preview) -> Iterator[str]:
    width = max(len(entry.label) for entry in preview.bins)
    for number, entry in enumerate(preview.bins):
        # A bin with any example is visible.
        eighths = max(round(entry.count / preview.most * BAR_LENGTH * 8), min(entry.count, 1))
        bar = "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()
        mark = preview.limit_mark(number)
        yield f"  {entry.label:>{width}}  {bar} {entry.count:,}" + f"  ◂ {mark}" * bool(mark)
