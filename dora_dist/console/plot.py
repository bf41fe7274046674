"""Pictures: matplotlib without a screen."""

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140)
    pyplot().close(figure)
