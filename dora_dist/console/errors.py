"""Errors that end a run with a message instead of a traceback, and the exit status of a run that can be resumed."""

from typing import TypeVar

Error = TypeVar("Error", bound=Exception)

PREEMPTED = 75
"""Exit status of a run that stopped after a signal or because a rank was lost. The same command resumes it
(EX_TEMPFAIL of sysexits.h)."""


def mark_common(error: Error) -> Error:
    """Mark an error that all ranks raise together, with the same message."""
    error.__dict__["raised_on_all_ranks"] = True
    return error


def is_common(error: Exception) -> bool:
    """Whether all ranks raise this error together; then it need not be reported to other ranks."""
    return isinstance(error, ExpectedRunError) or "raised_on_all_ranks" in error.__dict__


def is_same_everywhere(error: Exception) -> bool:
    """Whether all ranks raise this error with the same message; then one of them prints it for all. Every rank prints
    its other errors itself (for example, that it cannot reach the others)."""
    return "raised_on_all_ranks" in error.__dict__


class ExpectedRunError(RuntimeError):
    """An error of a run, printed as its message without a traceback. With several ranks, all ranks raise one."""


class PreemptedError(ExpectedRunError):
    """The run stopped after a signal, with a complete checkpoint from which the same command resumes."""
