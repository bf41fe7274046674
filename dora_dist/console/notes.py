"""Notes that ranks leave of how they ended, for whoever started them."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dora_dist.console.files import write_json

NOTES = "DORA_DIST_NOTES"
"""Environment variable: process number of ``dora-dist train`` and folder for the notes of its ranks. While that process
is there, the ranks leave it to it to print how they ended."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable: file that torch's launcher (``torchrun``, ``accelerate launch``) quotes in its last words."""


@dataclass(frozen=True)
class Note:
    """How a rank ended.

    Attributes:
        status: Its exit status.
        message: What a user should know, in words.
    """

    status: int
    message: str


def leave_note(note: Note) -> bool:
    """Leave a note for whoever started this process. Never raises: the process is about to end.

    Returns:
        Whether the starter prints it.
    """
    try:
        if path := os.environ.get(ERROR_FILE):
            # torch 2.13, distributed.elastic.multiprocessing.errors: what its summary shows is the "call stack".
            extra = {"py_callstack": note.message, "timestamp": str(int(time.time()))}
            write_json(Path(path), {"message": {"message": note.message, "extraInfo": extra}})
        starter, _, folder = os.environ.get(NOTES, "").partition(" ")
        if not folder or os.getppid() != int(starter):
            return False
        write_json(Path(folder) / f"{os.environ['RANK']}.json", asdict(note))
    except (OSError, KeyError, ValueError):  # a full disk, say
        return False
    return True


def read_notes(folder: Path) -> dict[int, Note]:
    """Rank -> its note, for the ranks that left one."""
    return {int(path.stem): Note(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")}
