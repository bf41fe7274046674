"""Finds the folders that are shipped beside the code: launch files, recipes, batch scripts."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(folder: str) -> Path:
    """Path of ``launch``, ``configs`` or ``slurm``: inside the package in an installed wheel, beside it in a
    checkout."""
    inside = PACKAGE / "shipped" / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder
