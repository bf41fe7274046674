"""Errors of a run that explain themselves, and the exit status of one that goes on."""

from typing import TypeVar

Error = TypeVar("Error", bound=Exception)

PREEMPTED = 75
"""Exit status of a run that stopped because it was told to, or because a rank was lost, and goes on when the same
command is started again (EX_TEMPFAIL of sysexits.h)."""


def mark_common(error: Error) -> Error:
    """Mark an error that all ranks raise together, with the same message."""
    error.__dict__["raised_on_all_ranks"] = True
    return error


def is_common(error: Exception) -> bool:
    """Whether all ranks raise this error together, so that nobody has to be told of it."""
    return isinstance(error, ExpectedRunError) or "raised_on_all_ranks" in error.__dict__


def is_same_everywhere(error: Exception) -> bool:
    """Whether all ranks raise this error with the same message, so that one of them can print it for all. Others, of a
    rank that is alone with it (it cannot reach the others, say), every rank prints."""
    return "raised_on_all_ranks" in error.__dict__


class ExpectedRunError(RuntimeError):
    """An error of a run whose message says all there is to say. With several ranks, all raise one together."""


class PreemptedError(ExpectedRunError):
    """The run was told to stop, and did so where the same command goes on. Raised on all ranks, with the same
    message."""
