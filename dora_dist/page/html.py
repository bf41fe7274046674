"""Escapes text and renders tables for a page."""

from collections.abc import Sequence
from html import escape

from dora_dist.console.text import visible


def text_of(text: str) -> str:
    """Any text, escaped for a page; line breaks are kept."""
    return escape(visible(text))


def table_of(table: Sequence[Sequence[str]]) -> str:
    """An HTML table, header first."""
    header, *rows = table
    lines = ["<tr>" + "".join(f"<th>{text_of(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f'<td dir="auto">{text_of(cell)}</td>' for cell in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
