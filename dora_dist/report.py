"""Show what runs did, from their files alone: a summary to read, pictures, and a page for a browser.

``dora-dist report RUN`` prints the summary and draws the pictures again. ``--html`` writes the page, one file that
needs neither network nor server.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dora_dist.console.command import run_command

IN_RUN = "in the folder of the run"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the summary of every run, draw its pictures, and write the page where it is asked for.

    Raises:
        ValueError: a folder is not that of a run, the page cannot be written there, or the library for its charts is
            not installed.
    """
    parser = argparse.ArgumentParser(prog="dora-dist report", description=__doc__)
    parser.add_argument(
        "runs", type=Path, metavar="RUN", nargs="+", help="folder of a run (output_dir of its configuration)"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        nargs="?",
        const=IN_RUN,
        help="write a page, with several runs beside each other; FILE may be left out for one run: RUN/report.html",
    )
    options = parser.parse_args(arguments)
    page = None if options.html is None else place_of_page(options.html, options.runs)
    if page is not None:
        from dora_dist.page.library import chart_library

        chart_library()  # raises if it is missing, before anything is drawn or printed
    from dora_dist.runs.summary import report  # matplotlib and torch are heavy imports

    print("\n\n".join(report(run) for run in options.runs))
    if page is not None:
        from dora_dist.page.document import write_page

        write_page(options.runs, page)
        print(f"  {'page':<16} {page}")


def place_of_page(given: str, runs: Sequence[Path]) -> Path:
    """The file of the page.

    Args:
        given: value of ``--html``, or :data:`IN_RUN`.
        runs: folders of the runs.

    Raises:
        ValueError: the file must be named (there are several runs), does not end in .html, or has no folder.
    """
    if given == IN_RUN:
        if len(runs) > 1:
            raise ValueError(f"--html has no file, but there are {len(runs)} runs: name it, as in --html runs.html")
        from dora_dist.runs.records import PAGE

        return runs[0] / PAGE
    page = Path(given)
    if page.suffix != ".html" or page.is_dir():
        raise ValueError(f"--html is {given}, but a page is a file named *.html: name one, after the runs")
    if not page.parent.is_dir():
        raise ValueError(f"--html is {given}, but there is no folder {page.parent}: make it, or name another file")
    return page


if __name__ == "__main__":
    run_command(main)
