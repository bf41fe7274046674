"""The command: plants ranks, trains students, prints a table, and writes JSON and a picture."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_dist.console.command import run_command
from dora_dist.console.files import write_json
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.text import aligned, say
from dora_dist.planted.options import build_parser, resolve


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the requested students, except those that ``--output`` already holds.

    Raises:
        ValueError: an option is invalid, or ``--output`` holds a result with other settings.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = resolve(build_parser().parse_args(arguments))
    result = read_result(options.output, options.settings())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    from dora_dist.console.provenance import PLANTED_PACKAGES, environment
    from dora_dist.planted.experiment import run_cells, summarize
    from dora_dist.planted.pictures import draw

    session = {"command": command_line(arguments), **environment(PLANTED_PACKAGES)}
    before = len(result["cells"])
    result["sessions"].append(session)
    run_cells(options, result, lambda: write_json(options.output, result), say)
    if len(result["cells"]) == before:
        result["sessions"].pop()
    result["rows"] = summarize(options, result)
    write_json(options.output, result)
    print(aligned(table(result["rows"])))
    draw(result, options, options.output.with_suffix(".png"))
    say(f"wrote {options.output} and {options.output.with_suffix('.png')}")


def command_line(arguments: Sequence[str]) -> str:
    """The command that made the result, without the machine's folders."""
    named = [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
    return shlex.join(["python", "-m", "dora_dist.planted", *named])


def read_result(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The result in a file, to be continued; empty if there is no file.

    Raises:
        ValueError: the file is not a result with these settings.
    """
    if not path.exists():
        return {"settings": dict(settings), "sessions": [], "truths": [], "cells": []}
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        theirs = result["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--output is {path}, which is not a result of this command ({error!r}): name another"
        ) from None
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"--output is {path}, whose {name} is {theirs.get(name)} and not {value}: name another file, or give "
                "the same settings to continue"
            )
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows of the table."""
    header = (
        "pattern|method|rate|divergence|sd|to uniform|95 % interval|gain|correlation|overlap|idle|parameters|"
        "score idle|score planted"
    )
    lines = [header.split("|")]
    for row in rows:
        difference, gain = row["to_uniform"], row.get("share_of_oracle_gain")
        score = row["at_final_event"].get("score", {})
        lines.append(
            [
                row["pattern"],
                row["method"],
                f"{row['learning_rate']:g}{' (edge)' if row['rate_at_edge'] else ''}",
                _number(row["divergence"]["mean"]),
                _number(row["divergence"]["deviation"]),
                _number(difference and difference["mean"], "+.4f"),
                f"{_number(difference['low'], '+.4f')} {_number(difference['high'], '+.4f')}" if difference else "-",
                _number(gain, ".0%"),
                _number(row["correlation"] and row["correlation"]["mean"], ".2f"),
                _number(row["overlap"]["mean"], ".2f"),
                _number(row["idle_share"]["mean"], ".2f"),
                _number(row["parameters"]["mean"], ".0f"),
                *(_number(score[group]["mean"] if group in score else None, ".3g") for group in ("idle", "planted")),
            ]
        )
    return lines


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    run_command(main)
