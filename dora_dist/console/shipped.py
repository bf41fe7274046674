"""Folders that come with the program beside its code: launch files, recipes, batch scripts."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(folder: str) -> Path:
    """Where ``launch``, ``configs`` or ``slurm`` is: inside the package where a wheel was installed, beside it in a
    checkout."""
    inside = PACKAGE / "shipped" / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder
