"""Tests the checkpoint folder on every rank: whether it exists, is shared and writable, and its speed. Removes its
files."""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dora_dist.console.text import MIB
from dora_dist.distributed.agreement import Agreement
from dora_dist.doctor.facts import StorageFacts

FIRST_PIECE, MOST_BYTES = 4 * MIB, 256 * MIB
MOST_SECONDS = 5.0
LARGEST_SHARE = 4
"""All nodes together write at most one part in this many of the free space."""
PATIENCE_SECONDS = 5.0
"""Time for a network file system to show a new file on another node."""
PREFIX = ".dora-doctor-"
MOUNTS = Path("/proc/self/mounts")


def check_storage(folder: Path, node: str, agreement: Agreement, measures: bool) -> list[StorageFacts]:
    """Test the folder on all ranks; returns the facts of all ranks, by rank.

    Args:
        folder: ``output_dir``; created if missing, and removed again.
        node: name of this rank's node.
        agreement: collectives over the ranks.
        measures: whether this rank measures the speed for its node.
    """
    name = agreement.gather(PREFIX + secrets.token_hex(4))[0]
    mine = f"{name}-{agreement.rank}"
    with made(folder if agreement.is_first else None) as failure:
        with cleaned(folder, mine):
            facts = _look(folder, node, agreement, name, failure)
            able = measures and facts.failure is None and facts.free is not None
            measuring = sum(agreement.gather(able))
            if able:
                facts = measured(facts, folder / f"{mine}-speed", measuring)
            agreement.barrier()  # keeps the token until all ranks have looked for it
        return agreement.gather(facts)  # keeps the folder until all ranks have removed their files


def _look(folder: Path, node: str, agreement: Agreement, name: str, failure: str | None) -> StorageFacts:
    """Facts of this rank, without speeds.

    Args:
        folder: folder to test.
        node: name of this rank's node.
        agreement: collectives over the ranks.
        name: prefix of all file names in this test.
        failure: the error if rank 0 could not create the folder; None on all other ranks.
    """
    token = folder / f"{name}-0-token"
    if agreement.is_first and failure is None:
        failure = _failure_of(lambda: write_file(token, name))
    (of_first, *_) = agreement.gather(failure)
    if of_first is not None:
        # The other ranks cannot find anything.
        there = failure is not None and os.path.isdir(folder)
        return describe(folder, node, False, failure) if there else StorageFacts(node=node, failure=failure)
    sees = sees_token(token, name)
    if not os.path.isdir(folder):  # unlike Path.is_dir, no error if a parent folder is not readable
        return StorageFacts(node=node, filesystem=filesystem_of(folder.resolve(), MOUNTS))
    return describe(folder, node, sees, _failure_of(lambda: try_files(folder, f"{name}-{agreement.rank}")))


@contextmanager
def made(folder: Path | None) -> Iterator[str | None]:
    """Creates a folder and its parents, and removes what it created at the end. Yields the error if it
    could not, or None."""
    missing = [] if folder is None else [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        yield None if folder is None else _failure_of(lambda: folder.mkdir(parents=True, exist_ok=True))
    finally:
        for path in missing:
            with suppress(OSError):  # not empty: another process has started to use it
                path.rmdir()


@contextmanager
def cleaned(folder: Path, prefix: str) -> Iterator[None]:
    """Removes this rank's files at the end, in any case, without waiting for other ranks."""
    try:
        yield
    finally:
        left: list[Path] = []
        with suppress(OSError):  # a folder that is not readable
            left = list(folder.glob(f"{prefix}-*"))
        for path in left:
            with suppress(OSError):
                path.unlink()


def write_file(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sees_token(path: Path, text: str) -> bool:
    """Whether a file that rank 0 has just written is visible here; on another node it may appear a little later."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        with suppress(OSError):
            os.listdir(path.parent)  # makes an NFS client refresh its view
            if path.read_text(encoding="ascii") == text:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def try_files(folder: Path, prefix: str) -> None:
    """Do with small files what a checkpoint needs: write, replace one by another, read back.

    Raises:
        OSError: one of these operations failed.
    """
    old, new = folder / f"{prefix}-old", folder / f"{prefix}-new"
    write_file(old, "old")
    write_file(new, "new")
    new.replace(old)
    if new.exists() or old.read_text(encoding="ascii") != "new":
        raise OSError("a file that was renamed over another did not take its place")


def describe(folder: Path, node: str, sees: bool, failure: str | None) -> StorageFacts:
    """The facts that the file system reports about itself."""
    space = os.statvfs(folder)
    return StorageFacts(
        node=node,
        sees=sees,
        failure=failure,
        filesystem=filesystem_of(folder.resolve(), MOUNTS),
        free=space.f_bavail * space.f_frsize,
        free_inodes=space.f_favail if space.f_files else None,
    )


def filesystem_of(folder: Path, mounts: Path) -> str | None:
    """Type of the file system that holds a folder, from the kernel's list of mounts."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return None
    # The list writes spaces as \040.
    holding = [(fields[1].replace("\\040", " "), fields[2]) for fields in lines if len(fields) > 2]
    holding = [(point, kind) for point, kind in holding if folder.is_relative_to(point)]
    # The deepest mount point; of several mounts at one place, the last covers the others.
    return max(enumerate(holding), key=lambda entry: (len(entry[1][0]), entry[0]))[1][1] if holding else None


def measured(facts: StorageFacts, path: Path, measuring: int) -> StorageFacts:
    """The facts with the speeds of writing and reading, or with the reason why they could not be measured."""
    most = min(MOST_BYTES, (facts.free or 0) // (LARGEST_SHARE * measuring))
    try:
        written, write = write_speed(path, most)
        return dataclasses.replace(facts, write=write, read=read_speed(path, written))
    except OSError as error:
        return dataclasses.replace(facts, failure=_text_of(error))


def write_speed(path: Path, most: int) -> tuple[int, float | None]:
    """Write a file in pieces of doubling size, each flushed to the disk, until the size or time limit is reached.

    Returns:
        Bytes written, and bytes per second; None if there was no room for the first piece.
    """
    piece, written = FIRST_PIECE, 0
    data = memoryview(os.urandom(FIRST_PIECE))  # compressible data would measure the compression
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while written + piece <= most and time.perf_counter() - start < MOST_SECONDS:
            for _ in range(piece // FIRST_PIECE):
                file.write(data)
            os.fsync(file.fileno())
            written += piece
            piece *= 2
    return written, written / (time.perf_counter() - start) if written else None


def read_speed(path: Path, size: int) -> float | None:
    """Bytes per second of reading a file after asking the node to drop its cache, as far as the system allows."""
    buffer = bytearray(FIRST_PIECE)
    read = 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while time.perf_counter() - start < MOST_SECONDS and (count := file.readinto(buffer)):
            read += count
        return read / (time.perf_counter() - start) if size else None


def _failure_of(work: Callable[[], object]) -> str | None:
    """The operating system's error for some work, or None."""
    try:
        work()
    except OSError as error:
        return _text_of(error)
    return None


def _text_of(error: OSError) -> str:
    return error.strerror or str(error)
