"""SQuAD's own files: one JSON object in which questions are nested in paragraphs, and these in articles."""

import json
import re
from collections.abc import Iterator
from typing import Any

from dora_dist.data.reading.row_json import object_of

ANSWER_FIELDS = ("text", "answer_start")
_STRING = rb'"(?:[^"\\]|\\.)*"'
_BEGINNING = re.compile(
    rb'\{\s*("version"\s*:\s*%b\s*,\s*)?"data"\s*:\s*\[\s*\{\s*("title"\s*:\s*%b\s*,\s*)?"paragraphs"\s*:'
    % (_STRING, _STRING)
)


def is_squad_file(beginning: bytes) -> bool:
    """Whether a file with this beginning is one of SQuAD's; a row of a JSONL file with a column ``data`` is none."""
    return _BEGINNING.match(beginning.removeprefix(b"\xef\xbb\xbf").lstrip()) is not None


def squad_rows(content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and row of every question, in order, as the Hub has them: see the format ``squad`` of
    :data:`~dora_dist.data.row_formats.FORMATS`. ``plausible_answers`` of unanswerable questions are not read.

    Raises:
        ValueError: the file is not nested as it should be.
    """
    for number, article in enumerate(
        _list(json.loads(content, object_pairs_hook=object_of), "data", "the file"), start=1
    ):
        for paragraph_number, paragraph in enumerate(_list(article, "paragraphs", f"article {number}"), start=1):
            place = f"article {number}, paragraph {paragraph_number}"
            for question_number, entry in enumerate(_list(paragraph, "qas", place), start=1):
                here = f"{place}, question {question_number}"
                answers = _list(entry, "answers", here)
                yield (
                    here,
                    {
                        "id": entry.get("id"),
                        "question": entry.get("question"),
                        "context": paragraph.get("context"),
                        "answers": {name: [_value(answer, name, here) for answer in answers] for name in ANSWER_FIELDS},
                    },
                )


def _list(value: Any, name: str, place: str) -> list[Any]:
    entries = _value(value, name, place)
    if not isinstance(entries, list):
        raise ValueError(f"{place} has {name} that are no list")
    return entries


def _value(value: Any, name: str, place: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise ValueError(f"{place} has no {name}, which SQuAD's own files have there")
    return value[name]
