"""Renders a preview as a single self-contained HTML file."""

from collections.abc import Iterator

from dora_dist.page.html import table_of, text_of
from dora_dist.preview.contents import Preview, ShownExample
from dora_dist.preview.tokens import Piece

BAR_WIDTH, BAR_HEIGHT, LABEL_WIDTH, COUNT_WIDTH = 420, 20, 110, 300
"""Sizes in the histogram, in pixels."""
STYLE = """
:root { color-scheme: light dark;
  --text: #1c1c1c; --page: #ffffff; --faint: #767676; --line: #d4d4d4; --given-a: #f0f0f0; --given-b: #e2e2e2;
  --trained-a: #bfe8c2; --trained-b: #a3d9a8; --edge: #2c8a3a; --mark: #b4432f; }
@media (prefers-color-scheme: dark) { :root {
  --text: #e6e6e6; --page: #161616; --faint: #9a9a9a; --line: #3c3c3c; --given-a: #262626; --given-b: #343434;
  --trained-a: #1d4d26; --trained-b: #2a6535; --edge: #6fd07f; --mark: #f08a75; } }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: var(--text); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .3rem; }
.faint { color: var(--faint); }
.tokens { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 6px; overflow-wrap: anywhere;
  font: 14px/1.9 ui-monospace, "Noto Sans Mono", "Noto Sans Mono CJK SC", monospace; }
.tokens div { white-space: pre-wrap; min-height: 1.9em; }
.tokens span { border-radius: 2px; padding: 2px 0; }
.given-0 { background: var(--given-a); } .given-1 { background: var(--given-b); }
.trained-0 { background: var(--trained-a); box-shadow: inset 0 -2px var(--edge); }
.trained-1 { background: var(--trained-b); box-shadow: inset 0 -2px var(--edge); }
.special { font-weight: 700; unicode-bidi: isolate; }
.tokens span:hover { outline: 2px solid var(--mark); }
.tokens .break { opacity: .55; font-weight: 400; outline: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg .bar { fill: var(--edge); } svg .limit { fill: var(--mark); }
"""


def build_page(preview: Preview) -> str:
    """The preview as a complete HTML document."""
    examples = "\n".join(map(_example, preview.examples))
    remarks = "\n".join(f"<p>{text_of(line)}</p>" for line in preview.remarks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text_of(preview.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{text_of(preview.title)}</h1>
<p><span class="trained-0">&nbsp;green, underlined&nbsp;</span> tokens are trained,
<span class="given-1">&nbsp;grey&nbsp;</span> ones are only read. Point at a token for its position, id and name.</p>
<p class="faint">{text_of(preview.note)}</p>
{examples}
<h2>Sources</h2>
<div class="scroll">{table_of(preview.table)}</div>
<h2>Lengths in tokens</h2>
<p>{text_of(preview.lengths)}</p>
{_histogram(preview)}
<h2>Steps</h2>
{remarks}
</body>
</html>
"""


def _example(example: ShownExample) -> str:
    lines: list[list[str]] = [[]]
    for number, piece in enumerate(example.pieces):
        for part, ended in _lines(piece.text):
            lines[-1].append(_token(piece, number, part, ended))
            if ended:
                lines.append([])
    if not lines[-1]:
        lines.pop()
        # One element per line, so that each right-to-left line is laid out correctly.
    body = "\n".join(f'<div dir="auto">{"".join(line)}</div>' for line in lines)
    return f'<section>\n<h3 dir="auto">{text_of(example.title)}</h3>\n<div class="tokens">\n{body}\n</div>\n</section>'


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a text between its line breaks, each with whether a break ends it. An empty part only before a
    break."""
    parts = text.split("\n")
    for part in parts[:-1]:
        yield part, True
    if parts[-1] or len(parts) == 1:
        yield parts[-1], False


def _token(piece: Piece, number: int, part: str, ended: bool) -> str:
    kind = "trained" if piece.trained else "given"
    classes = f"{kind}-{number % 2}" + " special" * piece.special
    last = piece.position + len(piece.ids) - 1
    positions = f"{piece.position}" if last == piece.position else f"{piece.position}-{last}"
    tip = f"position {positions}, id {' '.join(map(str, piece.ids))}, {' '.join(piece.names)}"
    tip += ", trained" if piece.trained else ", not trained"
    end = '<span class="break">↵</span>' if ended else ""
    return f'<span class="{classes}" title="{text_of(tip)}">{text_of(part)}{end}</span>'


def _histogram(preview: Preview) -> str:
    """Bars from top to bottom, as in the terminal's output."""
    width, height = LABEL_WIDTH + BAR_WIDTH + COUNT_WIDTH, BAR_HEIGHT * len(preview.bins)
    lines = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    lines.append("<title>Examples by their number of tokens</title>")
    for number, entry in enumerate(preview.bins):
        top, base = number * BAR_HEIGHT, number * BAR_HEIGHT + BAR_HEIGHT - 6
        # A bin with any example is visible.
        length = max(1.0, BAR_WIDTH * entry.count / preview.most) if entry.count else 0.0
        lines.append(f'<text x="{LABEL_WIDTH - 8}" y="{base}" text-anchor="end">{entry.label}</text>')
        lines.append(
            f'<rect class="bar" x="{LABEL_WIDTH}" y="{top + 3}" width="{length:.1f}" height="{BAR_HEIGHT - 6}"/>'
        )
        mark = preview.limit_mark(number)
        note = f'<tspan class="limit" dx="8">◂ {text_of(mark)}</tspan>' if mark else ""
        lines.append(f'<text x="{LABEL_WIDTH + length + 6:.1f}" y="{base}">{entry.count:,}{note}</text>')
    return "\n".join([*lines, "</svg>"])
