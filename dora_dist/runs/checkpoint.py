"""Checkpoints that are complete or not used.

:mod:`dora_dist.training.checkpointing` writes and reads what is in them. This file adds, as the very last thing, a
manifest with size and SHA-256 of every file. A folder without a manifest, or with a file that does not fit it, is never
resumed from.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from dora_dist.config.format_version import METHOD_STATE
from dora_dist.console.files import follow_umask, read_json, write_json

MANIFEST = "complete.json"
SHARDS = "optimizer"
"""Folder of the optimizer's state under ZeRO."""
ALMOST_NOTHING = 2**18
"""Free space, in bytes, below which a disk counts as full."""


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, complete or not, oldest step first."""
    return sorted((path for path in run.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0), key=_step)


def _step(path: Path) -> int:
    """Optimizer step of a checkpoint folder, -1 if its name is not one."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def _sealed(folders: Sequence[Path]) -> list[Path]:
    """The folders with a manifest: each was complete once, whatever has become of it since (see :func:`flaw_of`)."""
    return [folder for folder in folders if (folder / MANIFEST).is_file()]


def newest(run: Path) -> Path | None:
    """The newest checkpoint that was complete once; None if there is none."""
    complete = _sealed(checkpoints(run))
    return complete[-1] if complete else None


def read_method_state(folder: Path) -> dict[str, Any]:
    """``format``, ``step``, ``processes`` and ``fingerprint`` of a checkpoint, and ``best`` where it has one
    (:meth:`~dora_dist.evaluation.best.BestCheckpoint.state`)."""
    state: dict[str, Any] = read_json(folder / METHOD_STATE)
    return state


@contextmanager
def plain_values_only(folder: Path | str | None) -> Iterator[None]:
    """Context for reading files that torch opens with ``weights_only``: a refusal by torch is explained.

    Raises:
        ValueError: a file holds something else than tensors, numbers and containers of them. Nothing of it was run.
    """
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"a file of {folder} holds other Python objects than tensors and numbers, which could run code and are not "
            f"loaded: it was not written by this program ({str(error).partition(chr(10))[0]})"
        ) from None


@contextmanager
def room_needed(folder: Path) -> Iterator[None]:
    """Context for writing a checkpoint: an error whose cause is a full disk says so, whichever library raised it.

    Raises:
        ValueError: the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder.parent).free
        reason = str(error).partition("\n")[0]
        # torch's writer does not pass the system's reason on.
        if not re.search("no space left|quota", reason, re.IGNORECASE) and free >= ALMOST_NOTHING:
            raise
        raise ValueError(
            f"no room for {folder} ({free / 2**20:.1f} MiB are free): {reason}. The checkpoints before it are "
            "unharmed; make room, lower checkpoint.keep_last, or move the run's folder and set output_dir to it"
        ) from None


def check_shards(folder: Path, world_size: int, engine: str) -> None:
    """Refuse to call a checkpoint complete that lacks a rank's part.

    Raises:
        ValueError: a part is missing, which happens where nodes do not share the folder.
    """
    expected = [random_state_name(rank, world_size) for rank in range(world_size)]
    if engine == "zero2":
        expected += [shard_name(rank) for rank in range(world_size)]
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}: output_dir must be on a file system that all nodes share"
        )


def random_state_name(rank: int, world_size: int) -> str:
    """Name of a rank's random states in the checkpoint's folder, as the Trainer names it."""
    return "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"


def shard_name(rank: int) -> str:
    """Name of a rank's part of the optimizer's state, relative to the checkpoint's folder."""
    return f"{SHARDS}/rank-{rank:05d}.safetensors"


def bring_to_disk(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Wait until files are on the disk; only then does a network file system report that it has no room for them.

    Returns:
        Name of a file -> its size and SHA-256.
    """
    files = {}
    for name in names:
        path = folder / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"size": path.stat().st_size, "sha256": digest}
    return files


def files_of_rank(folder: Path, rank: int, world_size: int) -> list[str]:
    """Names of the files that this rank alone writes into a checkpoint, and that are there."""
    names = [random_state_name(rank, world_size), shard_name(rank)]
    return [name for name in names if (folder / name).is_file()]


def seal(folder: Path, written: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Declare a checkpoint complete, after all ranks have written theirs: everything on disk, then the manifest.

    Args:
        folder: the checkpoint's folder.
        written: size and SHA-256 of the files that the ranks have written, as each rank sees its own
            (:func:`bring_to_disk`).

    Raises:
        ValueError: this rank sees other sizes or contents.
    """
    follow_umask(folder)
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )
    files = bring_to_disk(folder, names)
    for name, expected in (written or {}).items():
        if files.get(name) != expected:
            raise ValueError(
                f"{folder / name} differs from the file that another rank wrote ({files.get(name)}, not {expected}): "
                "output_dir must be on a file system that all nodes share, and that shows closed files to all"
            )
    write_json(folder / MANIFEST, files)
    for path in (folder / MANIFEST, folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flaw_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete and unharmed."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "it was not completed"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return f"{MANIFEST} is not JSON"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def find_resumable(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and remarks on the ones that were passed over.

    Args:
        run: the run's folder.
        resume: ``auto``, ``never``, or the path of a checkpoint.

    Raises:
        ValueError: the given checkpoint cannot be used; checkpoints of another course of the run would be mixed with
            the new ones; or all complete checkpoints have been damaged since.
    """
    existing = checkpoints(run)
    sealed = _sealed(existing)
    if resume == "never":
        _refuse_to_mix(run, sealed, "checkpoint.resume is never")
        return None, []
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            raise ValueError(f"checkpoint.resume {resume!r} is neither auto nor never nor a folder")
        if flaw := flaw_of(path):
            raise ValueError(f"cannot resume from {path}: {flaw}")
        _refuse_to_mix(run, [other for other in sealed if _step(other) > _step(path)], f"checkpoint.resume is {path}")
        return path, []
    remarks: list[str] = []
    for path in reversed(existing):
        flaw = flaw_of(path)
        if flaw is None:
            return path, remarks
        remarks.append(f"passing over {path.name}: {flaw}")
    if sealed:
        raise ValueError(f"no checkpoint of {run} can be used ({'; '.join(remarks)}): delete them to start again")
    return None, remarks


def _refuse_to_mix(run: Path, others: Sequence[Path], reason: str) -> None:
    if others:
        raise ValueError(
            f"{reason}, but {run} holds {', '.join(path.name for path in others)}, which the new run would mix "
            "with its own: choose another output_dir, or delete them"
        )


def best_of(folder: Path) -> Path | None:
    """The best checkpoint so far, by what a checkpoint of the same run records; None where it records none."""
    try:
        step = (read_method_state(folder).get("best") or {}).get("step")
    except (OSError, ValueError):  # a damaged one, which is no reason to end a healthy run
        return None
    return None if step is None else folder.with_name(f"checkpoint-{step}")


def rotate(saved: Path, keep_last: int) -> None:
    """Delete old checkpoints: incomplete ones older than the newest, and complete ones except the newest ``keep_last``
    and those that these name as the best.

    Checkpoints of later steps than the one just saved are deleted too: they are damaged or incomplete, so the run
    passed them over when it resumed, and has taken their steps again.

    Args:
        saved: the checkpoint that has just been completed, which always stays.
        keep_last: number of complete checkpoints to keep, at least 1.
    """
    existing = checkpoints(saved.parent)
    kept = _sealed([path for path in existing if _step(path) <= _step(saved)])[-keep_last:]
    kept += [best for path in kept if (best := best_of(path))]
    for path in existing:
        if path not in kept:
            # First the manifest, so that a deletion that is interrupted leaves nothing that looks complete.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)  # what is left of it is no reason to end a healthy run
