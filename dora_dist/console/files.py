"""Reads and writes JSON files, JSONL records and text, makes new folders, and hashes source files."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from dora_dist.console.text import say


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old or the new content, never a part."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a record. An incomplete line that a killed process left at its end is ended first, so that the
    new line is not lost with it."""
    with path.open("a+b") as file:
        is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * is_torn + line.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a JSONL record, one after the other.

    An incomplete last line, which a process is writing or has left when it was killed, is ignored. Any other line that
    cannot be read is a lost measurement: it is left out with a remark, and reading goes on.
    """
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError:  # no JSON, or no UTF-8
                if text.endswith(b"\n"):
                    say(f"{path}: line {number} is torn, as by a process that was killed, and left out")
                continue
            yield line


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSONL record; see :func:`each_line`."""
    return list(each_line(path))


def refuse_taken(output: Path, option: str) -> None:
    """Refuse an output folder that exists, or that lies below a file, before anything is computed for it.

    Args:
        output: the folder.
        option: the option that gave the folder, such as ``--output``.

    Raises:
        ValueError: the folder exists, or a parent of it is a file.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: give another folder as {option}, or delete it")
    if files := [parent for parent in output.parents if parent.is_file()]:
        raise ValueError(f"{option} is {output}, but {files[0]} is a file: give another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``output`` at the end, or is removed if anything fails.

    Raises:
        ValueError: somebody else has made ``output`` in the meantime.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        follow_umask(temporary)
        if output.exists():
            raise ValueError(f"{output} was made by another process in the meantime: it is left as it is")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give a folder's files its own read permissions, which follow the umask. (safetensors 0.8 makes files that only
    their owner can read.)"""
    readers = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readers)


def digest_sources(folder: Path) -> str:
    """SHA-256 of the names and contents of all Python files in a folder and its subfolders."""
    digest = sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
