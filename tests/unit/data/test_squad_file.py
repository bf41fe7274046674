import gzip
import json
from pathlib import Path

import pytest

from dora_dist.data.reading.files import locate
from dora_dist.data.reading.samples import Question
from dora_dist.data.row_formats import FORMATS

ARTICLES = [
    {
        "title": "Ann [sic]",
        "paragraphs": [
            {
                "context": "Ann has a ball.",
                "qas": [
                    {"id": "a", "question": "Who has a ball?", "answers": [{"answer_start": 0, "text": "Ann"}]},
                    {
                        "id": "b",
                        "question": "Who has a kite?",
                        "answers": [],
                        "plausible_answers": [{"answer_start": 0, "text": "Ann"}],
                        "is_impossible": True,
                    },
                ],
            },
            {"context": "Bob runs.", "qas": []},
        ],
    },
    {"title": "", "paragraphs": [{"context": "Éve sleeps.", "qas": [{"id": "c", "question": "Who?", "answers": []}]}]},
]
WAYS = {
    "v1, training": {"data": ARTICLES, "version": "1.1"},
    "v2": {"version": "v2.0", "data": ARTICLES},
}


def rows(path: Path) -> list[tuple[str, Question]]:
    found = [(raw.place.removeprefix(f"{path}, "), json.loads(raw.json)) for raw in locate(str(path)).rows()]
    return [(place, FORMATS["squad"].parse(row)) for place, row in found]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", WAYS)
def test_questions_are_read_from_squads_own_files(tmp_path, name, indent, packed):
    content = json.dumps(WAYS[name], indent=indent).encode()
    path = tmp_path / ("train.json.gz" if packed else "train.json")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert rows(path) == [
        (
            "article 1, paragraph 1, question 1",
            Question("Who has a ball?", "Ann has a ball.", ("Ann",), (0,)),
        ),
        ("article 1, paragraph 1, question 2", Question("Who has a kite?", "Ann has a ball.", (), ())),
        ("article 2, paragraph 1, question 1", Question("Who?", "Éve sleeps.", (), ())),
    ]


@pytest.mark.parametrize(
    ("articles", "message"),
    [
        ([{"title": "x", "paragraphs": [{"context": "y"}]}], "article 1, paragraph 1 has no qas"),
        ([{"paragraphs": []}, {"title": "x"}], "article 2 has no paragraphs"),
        ([{"paragraphs": [{"context": "y", "qas": {}}]}], "article 1, paragraph 1 has qas that are no list"),
        ([{"paragraphs": [{"qas": [{"answers": [{"text": "x"}]}]}]}], "paragraph 1, question 1 has no answer_start"),
    ],
)
def test_what_is_not_nested_as_it_should_be_is_refused_with_its_place(tmp_path, articles, message):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    with pytest.raises(ValueError, match=rf"dev\.json cannot be read: .*{message}"):
        rows(path)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "dev.json"
    content = json.dumps({"version": "v2.0", "data": ARTICLES})
    path.write_text(content.replace('"question": "Who?"', '"question": "Which?", "question": "Who?"'))
    with pytest.raises(ValueError, match=r"dev\.json cannot be read: .*the key 'question' stands twice in one object"):
        rows(path)


def test_lines_with_a_column_of_that_name_are_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = {"data": [{"x": 1}], "text": "paragraphs"}
    path.write_text(f"{json.dumps(line)}\n" * 2)
    assert [json.loads(raw.json) for raw in locate(str(path)).rows()] == [line, line]
