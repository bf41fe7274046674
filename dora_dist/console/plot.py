"""Pictures are drawn with matplotlib, without a screen."""

from pathlib import Path
from typing import Any, BinaryIO

DOTS_PER_INCH = 140
"""Resolution of a picture, unless its size asks for another one."""


def pyplot() -> Any:
    """``matplotlib.pyplot`` with a backend that needs no screen; imported here because it is heavy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path | BinaryIO, dpi: int = DOTS_PER_INCH) -> None:
    """Write a matplotlib figure into a file and close it.

    Args:
        figure: The matplotlib figure.
        path: The file; its suffix is the format, and that of an open file PNG.
        dpi: Dots per inch.
    """
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)
