"""Notes in which ranks record how they ended, for the process that started them."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dora_dist.console.files import write_json

NOTES = "DORA_DIST_NOTES"
"""Environment variable: process number of ``dora-dist train``, and the folder for its ranks' notes. While that process
is alive, it prints how the ranks ended, and the ranks do not."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable: file that torch's launcher (``torchrun``, ``accelerate launch``) quotes in its summary."""


@dataclass(frozen=True)
class Note:
    """How a rank ended.

    Attributes:
        status: the rank's exit status.
        message: the rank's message for the user.
    """

    status: int
    message: str


def leave_note(note: Note) -> bool:
    """Leave a note for the process that started this one. Never raises, because this process is about to end.

    Returns:
        Whether that process prints the note.
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
    except (OSError, KeyError, ValueError):  # a full disk, for example
        return False
    return True


def read_notes(folder: Path) -> dict[int, Note]:
    """Rank -> its note, for all ranks that left one."""
    return {int(path.stem): Note(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")}
