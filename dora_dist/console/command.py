"""How every command ends: an error that the user can correct is one message, without a traceback."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from dora_dist.console.errors import PREEMPTED, ExpectedRunError, PreemptedError, is_same_everywhere
from dora_dist.console.notes import Note, leave_note
from dora_dist.console.text import escaped, say

Result = TypeVar("Result")

LINGER_SECONDS = 5.0
LAST_ACT_SECONDS = 5.0
"""Longest time that :func:`do_last` may take."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""
_last_act: Callable[[str, bool], None] | None = None


def do_last(act: Callable[[str, bool], None]) -> None:
    """Have something done when this process ends without a result, after it has said why.

    It runs in a thread of its own, for at most :data:`LAST_ACT_SECONDS`. Its errors are dropped, because this process
    is about to end with another one.

    Args:
        act: takes the first line of the message, and whether the process was stopped (by a signal) rather than failed.
    """
    global _last_act
    _last_act = act


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main`` and turn expected errors into a message and an exit status.

    ``ValueError`` (the configuration or the input is invalid) exits with 2, and expected errors of the run
    (disagreement or failure of ranks, missed budget, loss not finite) with 1. A preempted run exits with
    :data:`PREEMPTED`. Anything else keeps its traceback, including a ``ValueError`` raised inside another library.
    """
    try:
        main()
    except PreemptedError as end:
        if not leave_note(Note(PREEMPTED, str(end))):
            say(str(end))
        _act_last(str(end), stopped=True)
        _exit(PREEMPTED)
    except KeyboardInterrupt:
        if not leave_note(Note(INTERRUPTED, "interrupted")):
            say("interrupted")
        _act_last("interrupted", stopped=True)
        _exit(INTERRUPTED)
    except Exception as error:
        own = isinstance(error, ExpectedRunError) or (isinstance(error, ValueError) and _raised_here(error))
        if not own:
            traceback.print_exc()
        leave(error, getattr(error, "status", 2 if own and isinstance(error, ValueError) else 1))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Seen once under DDP: after all work was done and written, a thread of the process group aborted a rank during
        # the interpreter's shutdown, and the launcher reported a failed run.
        _exit(0)


@dataclass(frozen=True)
class Captured(Generic[Result]):
    """The outcome of a call: its value, or the exception that it raised."""

    _value: Result | None = None
    _error: Exception | None = None

    def result(self) -> Result:
        """The value of the call.

        Raises:
            Exception: the exception of the call.
        """
        if self._error is not None:
            raise self._error
        return cast(Result, self._value)


def capture(function: Callable[..., Result], *arguments: Any) -> Captured[Result]:
    """Call a function now, and keep its exception until :meth:`Captured.result` is called."""
    try:
        return Captured(function(*arguments))
    except Exception as error:
        return Captured(None, error)


def _raised_here(error: Exception) -> bool:
    """Whether the innermost frame is in this project, so that its message was written for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])


def leave(error: Exception, status: int, linger: bool = True) -> None:
    """Report an error and end this process, from any thread.

    If all ranks have the same message, the first rank of each node prints it. The process that started the ranks may
    print it instead (:mod:`dora_dist.console.notes`).

    Args:
        error: the error.
        status: exit status of this process.
        linger: do what :func:`do_last` was given, and with several ranks wait a moment, so that the others can report
            their errors.
    """
    message = f"error: {escaped(str(error))}"
    sys.stdout.flush()
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if not leave_note(Note(status, message)) and (is_first_here or not is_same_everywhere(error)):
        rank = os.environ.get("RANK")
        # One write: ranks share the terminal.
        sys.stderr.write(f"{message}\n" if rank is None else f"[rank {rank}] {message}\n")
        sys.stderr.flush()
    if linger:
        reported = time.monotonic()
        _act_last(str(error), stopped=False)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # The launcher ends all ranks as soon as one has exited.
            time.sleep(max(0.0, reported + LINGER_SECONDS - time.monotonic()))
    _exit(status)


def _act_last(message: str, stopped: bool) -> None:
    if (act := _last_act) is None:
        return

    def run() -> None:
        with suppress(Exception):
            act(message.strip().partition("\n")[0], stopped)

    # A daemon: it must not keep this process alive, on a file system that has gone, say.
    thread = threading.Thread(target=run, name="last act", daemon=True)
    thread.start()
    thread.join(LAST_ACT_SECONDS)


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of NCCL or gloo may wait for another rank in the interpreter's shutdown.
    os._exit(status)
