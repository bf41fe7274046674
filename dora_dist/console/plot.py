"""Draws pictures with matplotlib, without a screen."""

from pathlib import Path
from typing import Any, BinaryIO

DOTS_PER_INCH = 140
"""Default resolution of a picture."""


def pyplot() -> Any:
    """``matplotlib.pyplot`` with a backend that needs no screen; imported here because it is heavy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path | BinaryIO, dpi: int = DOTS_PER_INCH) -> None:
    """Write a matplotlib figure to a file and close it.

    Args:
        figure: the matplotlib figure.
        path: the file to write; its suffix gives the format. An open file gets PNG.
        dpi: resolution in dots per inch.
    """
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)
