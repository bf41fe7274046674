"""What the documents say, for tests that compare it with what is there."""

import re

from support.repository import REPOSITORY

DOCS = REPOSITORY / "docs"


def table_names(document: str, heading: str) -> set[str]:
    """Names in the first column of the table below a heading; a row may have several."""
    section = (DOCS / document).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
