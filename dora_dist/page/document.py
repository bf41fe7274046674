"""Renders runs as a page: one HTML file that contains the charting library."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from dora_dist.console.files import write_text
from dora_dist.console.text import say
from dora_dist.page.contents import Contents, Example, read_contents
from dora_dist.page.curves import Panel
from dora_dist.page.html import table_of, text_of
from dora_dist.page.library import chart_library
from dora_dist.runs.records import PAGE

REFRESH_SECONDS = 30
"""Interval after which the page of a running run reloads its file."""
NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy: the browser sends no requests."""

INTRODUCTION = (
    "A run trains an adapter: small matrices beside the layers of a base model, which itself stays as it is. "
    "A component is the smallest part of an adapter, a column times a row; a layer's rank is how many it has.",
    "At an event, the run decides which components the layers have from then on. This page shows how good the model "
    "is, how the training went, where the components are, and what the model answers.",
)
"""Introduction for readers who have never heard of the method: what a run, a component and an event are, and what the
page shows."""
ABOUT_MAPS = (
    "A row is a layer of the base, a column a kind of matrix in it, and a number how many components the adapter has "
    "there. The darker, the more. The slider goes through the events."
)
ABOUT_ANSWERS = (
    "What the model writes for prompts that the run does not train on, the latest first. The reference is the answer "
    "in the data."
)
NOTHING = '<span class="faint">(nothing)</span>'
"""Shown for an empty answer."""


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of one run, or of several runs side by side.

    Args:
        folders: folders of the runs, which may still be running.
        path: file of the page. If a running run writes this file itself, the page reloads itself.

    Raises:
        ValueError: a folder is not a run's folder, or is given twice; or bokeh is not installed.
        OSError: the file cannot be written.
    """
    contents = read_contents(folders)
    write_text(path, build_page(contents, refreshes=contents.alive and list(folders) == [path.parent]))


def keep_current(run: Path) -> None:
    """Write a run's page into its folder. Never raises, because the run matters more than the page; errors are
    printed."""
    try:
        write_page([run], run / PAGE)
    except Exception as error:
        say(f"{run / PAGE} could not be written; the run continues without it: {type(error).__name__}: {error}")


def build_page(contents: Contents, refreshes: bool) -> str:
    """The page as a complete HTML document.

    Args:
        contents: the page's content.
        refreshes: whether the page reloads its own file every :data:`REFRESH_SECONDS`.

    Raises:
        ValueError: bokeh is not installed.
    """
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if refreshes else ""
    written = f"Written {contents.written}" + f"; reloads every {REFRESH_SECONDS} s" * refreshes
    states = "\n".join(f"<p>{text_of(state)}</p>" for state in contents.states)
    introduction = "\n".join(f'<p class="about">{text_of(line)}</p>' for line in INTRODUCTION)
    charts = "\n".join(_figure(panel, number) for number, panel in enumerate(contents.panels))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}
<title>{text_of(contents.title)}</title>
<style>{_shipped("page.css")}</style>
</head>
<body>
<h1 dir="auto">{text_of(contents.title)}</h1>
<div id="states">{states}</div>
<p class="faint">{text_of(written)}.</p>
{introduction}
<noscript><p>The charts and the map of ranks need JavaScript, which this browser does not run.</p></noscript>
<div class="scroll facts">{table_of(contents.facts)}</div>
{_settings(contents)}
<h2>Over the optimizer steps</h2>
<div id="charts">
{charts or "<p>Nothing is logged yet.</p>"}
</div>
<h2>Ranks by layer and module</h2>
{_maps(contents)}
<h2>Generated answers</h2>
{_examples(contents.examples)}
<script type="application/json" id="data">{_data(contents)}</script>
<script>{chart_library()}</script>
<script>{_shipped("page.js")}</script>
</body>
</html>
"""


@cache
def _shipped(name: str) -> str:
    """Content of a file in this room's folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _data(contents: Contents) -> str:
    """The data that the script draws. No text in it can close the script element."""
    values = {"panels": list(map(asdict, contents.panels)), "maps": list(map(asdict, contents.maps))}
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _figure(panel: Panel, number: int) -> str:
    unit = f' <span class="faint">({text_of(panel.unit)})</span>' if panel.unit else ""
    note = f'<p class="faint">{text_of(panel.note)}</p>' if panel.note else ""
    title = f"<figcaption>{text_of(panel.title)}{unit}</figcaption>"
    about = f'<p class="about">{text_of(panel.about)}</p>'
    return f'<figure>{title}{about}<div class="chart" data-panel="{number}"></div>{note}</figure>'


def _settings(contents: Contents) -> str:
    if not contents.settings:
        return ""
    table = table_of(contents.settings)
    return f'<details><summary>Settings that differ</summary><div class="scroll facts">{table}</div></details>'


def _maps(contents: Contents) -> str:
    if not any(one.frames for one in contents.maps):
        return "<p>No event has taken place yet.</p>"
    return f"""<p class="about">{ABOUT_MAPS}</p>
<div id="controls">
<label>Show <select id="quantity"><option value="ranks">components kept</option>
<option value="scores">mean score of the components</option></select></label>
<label>After <output id="position"></output> <input type="range" id="slider" min="0" step="1"></label>
</div>
<div id="maps"></div>"""


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return "<p>None: the task or its metrics generate no text, or nothing was evaluated yet.</p>"
    return "\n".join([f'<p class="about">{ABOUT_ANSWERS}</p>', *map(_example, examples)])


def _example(example: Example) -> str:
    answers = "\n".join(
        f'<dt>{text_of(where)}</dt><dd dir="auto">{text_of(answer) or NOTHING}</dd>'
        for where, answer in example.answers
    )
    return f"""<article>
<h3 dir="auto">{text_of(example.title)}</h3>
<dl><dt>prompt</dt><dd dir="auto" class="faint prompt">{text_of(example.prompt)}</dd>
<dt>reference</dt><dd dir="auto">{text_of(example.reference)}</dd></dl>
<dl class="answers">{answers}</dl>
</article>"""
