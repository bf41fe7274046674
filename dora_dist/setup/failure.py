"""How a run that ends without a result says so in its folder: a record, and its page."""

from collections.abc import Callable
from pathlib import Path

from dora_dist.runs import records


class FailureRecorder:
    """Records that this start of a run failed or was stopped, for those who read its folder.

    Nothing is recorded before the run has begun to write: what is in the folder then is an earlier start's.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._step: Callable[[], int] | None = None

    def run_has_begun(self, step: Callable[[], int]) -> None:
        """From here on, the folder is this start's.

        Args:
            step: returns the optimizer step that has begun, counted from 1; 0 before the first one.
        """
        self._step = step

    def record(self, message: str, stopped: bool) -> None:
        """Record the end, and write the page again; see :func:`~dora_dist.console.command.do_last`.

        Args:
            message: why, in one line.
            stopped: whether the run was told to stop, rather than failed.

        Raises:
            OSError: the folder cannot be written to.
        """
        if self._step is None or not (self._run / records.RUN).is_file():
            return
        if records.record_failure(self._run, message, step=self._step(), stopped=stopped):
            from dora_dist.page.document import write_page  # a rank that is only starting does not wait for it

            write_page([self._run], self._run / records.PAGE)
