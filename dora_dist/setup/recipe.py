"""Configurations to start from, and batch scripts for Slurm.

``dora-dist recipe`` lists the configurations, ``dora-dist recipe NAME > my.yaml`` prints one, and
``dora-dist recipe --slurm DIR`` writes a folder to submit jobs from.
"""

import argparse
import shutil
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from dora_dist.config.checks import nearest
from dora_dist.console.shipped import shipped

SUBMITTED = ("slurm", "launch")
"""Folders that the batch scripts need beside each other in the folder that they are submitted from."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this configuration; without it, list all")
    parser.add_argument("--slurm", type=Path, metavar="DIR", help="write the batch scripts into this new folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """List, print, or write.

    Raises:
        ValueError: There is no such recipe, or the folder is not empty.
    """
    options = build_parser().parse_args(arguments)
    if options.slurm is not None:
        write_slurm(options.slurm)
    elif options.name is None:
        print("\n".join(f"{name:<44} {title_of(path)}" for name, path in recipes().items()))
        print("\ncompare/NAME is for dora-dist compare, every other one for dora-dist train")
    else:
        print(find(options.name).read_text(encoding="utf-8"), end="")


def recipes() -> dict[str, Path]:
    """Name -> file, such as ``paper/roberta-base_cola``; those of the subfolders come last."""
    folder = shipped("configs")
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (path.parent != folder, path))
    return {str(path.relative_to(folder).with_suffix("")): path for path in files}


def title_of(path: Path) -> str:
    """The first sentence of a recipe's comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return comment.partition(". ")[0].removesuffix(".")


def find(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: There is none of this name.
    """
    known = recipes()
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    if wanted not in known:
        raise ValueError(f"{name!r} is no recipe{nearest(wanted, known)} (dora-dist recipe lists them)")
    return known[wanted]


def write_slurm(folder: Path) -> None:
    """Write what ``sbatch slurm/one_node.sbatch ...`` needs into a folder that is new or empty.

    Raises:
        ValueError: There is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--slurm is {folder}, which is not empty: give a new folder")
    for name in SUBMITTED:
        shutil.copytree(shipped(name), folder / name, ignore=shutil.ignore_patterns("site.sh", "__pycache__"))
    print(f"written: {folder}. Submit from there: cd {folder} && sbatch slurm/one_node.sbatch --config my.yaml")
