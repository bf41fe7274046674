"""Notes that ranks leave of how they ended, for whoever started them."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

NOTES = "DORA_DIST_NOTES"
"""Environment variable: folder for the notes of ``dora-dist train``'s ranks. Where it is set, the ranks leave it to
their starter to print how they ended."""
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
    """Leave a note for whoever started this process.

    Returns:
        Whether the starter prints it.
    """
    if path := os.environ.get(ERROR_FILE):
        # torch 2.13, distributed.elastic.multiprocessing.errors: what its summary shows is the "call stack".
        extra = {"py_callstack": note.message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": note.message, "extraInfo": extra}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    folder = os.environ.get(NOTES)
    if not folder:
        return False
    path_of_rank = Path(folder) / f"{os.environ['RANK']}.json"
    path_of_rank.write_text(json.dumps(asdict(note)), encoding="utf-8")
    return True


def read_notes(folder: Path) -> dict[int, Note]:
    """Rank -> its note, for the ranks that left one."""
    return {int(path.stem): Note(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")}
