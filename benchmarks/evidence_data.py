"""The splits that the comparisons of docs/evidence.md train, search and report on, from the sets as they are published.

    python benchmarks/evidence_data.py SETS data/evidence
    python benchmarks/evidence_data.py SETS data/evidence --only metamathqa

SETS is a folder with e2e/{trainset,devset}.csv, gsm8k/{train,test}.jsonl, alpaca_data.json, {train,dev}.tsv of
glue/{CoLA,MRPC,RTE,SST-2,STS-B}, and conversations or alpaca rows in multilingual/{en,fi,fr,zh}.jsonl or .json; .json
may be packed with gzip. Rows are short enough for the small models that are compared on a CPU. metamathqa, for a large
model, is made where --only names it, of MetaMathQA-395K.json and gsm8k. Learning rates are chosen on search.jsonl;
report.jsonl is for the figures, and has the rows of multilingual/report-LANGUAGE.jsonl. No row is in two of the three,
and E2E's two held-out splits share no meaning representation.
"""

import argparse
import csv
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]
HELD_OUT = 300
"""Rows of each held-out split, where there are enough."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``NAME/{train,search,report}.jsonl`` for every set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETS, default=[name for name in SETS if name != "metamathqa"])
    options = parser.parse_args(arguments)
    for name in options.only:
        splits = without_repetitions(SETS[name](options.sets))
        folder = options.output / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(name, {split: len(rows) for split, rows in splits.items()})


def without_repetitions(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Leave out held-out rows that are also trained on, and searched rows that are also reported."""
    train, report = ({_key(row) for row in splits[name]} for name in ("train", "report"))
    apart = {"train": set(), "search": train | report}
    return {name: [row for row in rows if _key(row) not in apart.get(name, train)] for name, rows in splits.items()}


def _key(row: Row) -> tuple[str, ...]:
    return tuple(text for name, text in row.items() if name != "label")


def e2e(sets: Path) -> dict[str, list[Row]]:
    """E2E data-to-text: a meaning representation, and a sentence that says it."""
    train = [_pair(row["mr"], row["ref"]) for row in _csv(sets / "e2e/trainset.csv")]
    held_out = [_pair(row["mr"], row["ref"]) for row in _csv(sets / "e2e/devset.csv")]
    meanings = sorted({row["prompt"] for row in held_out})
    random.Random(0).shuffle(meanings)
    searched = set(meanings[::2])
    parts = {
        "search": [row for row in held_out if row["prompt"] in searched],
        "report": [row for row in held_out if row["prompt"] not in searched],
    }
    return {"train": _sample(train, 12_000), **{name: _sample(rows, HELD_OUT) for name, rows in parts.items()}}


def gsm8k(sets: Path) -> dict[str, list[Row]]:
    """Grade-school mathematics; question and answer of a row have at most 400 bytes together."""
    train, test = (
        [_pair(row["question"], row["answer"]) for row in _json_lines(sets / f"gsm8k/{split}.jsonl")]
        for split in ("train", "test")
    )
    held_out = _sample(_short(test, 400), 10**6)
    return {"train": _short(train, 400), "search": held_out[::2], "report": held_out[1::2]}


def metamathqa(sets: Path) -> dict[str, list[Row]]:
    """Mathematics as in PEFT's benchmark: MetaMathQA to train on, with at most 1,300 characters a row, and the test set
    of GSM8K to report on. Search rows are some of GSM8K's training questions. MetaMathQA is made from these questions;
    unlike in PEFT's benchmark, rows made from the search questions are not trained on."""
    searched, test = (_json_lines(sets / f"gsm8k/{split}.jsonl") for split in ("train", "test"))
    searched = random.Random(0).sample(searched, min(HELD_OUT, len(searched)))
    questions = {row["question"].strip() for row in searched}
    train = [
        _asked(row["query"], row["response"])
        for row in _json(sets / "MetaMathQA-395K.json")
        if len(f"{row['query']} {row['response']}") <= 1300 and row["original_question"].strip() not in questions
    ]
    held_out = [[_asked(row["question"], row["answer"]) for row in rows] for rows in (searched, test)]
    return {"train": train, "search": held_out[0], "report": held_out[1]}


def alpaca(sets: Path) -> dict[str, list[Row]]:
    """Instructions of at most 300 bytes, with input and answer."""
    rows = [row for row in _json(sets / "alpaca_data.json") if row["output"].strip()]
    return _split(_sample(_short(rows, 300), 6000 + 2 * HELD_OUT), HELD_OUT)


def multilingual(sets: Path) -> dict[str, list[Row]]:
    """The first question and answer of conversations in English, Finnish and French, and Chinese instructions, of 500
    bytes at most, every language about as often."""
    by_language = {}
    for language in ("en", "fi", "fr", "zh"):
        path = next((sets / "multilingual").glob(f"{language}.json*"))
        rows = _json_lines(path) if path.suffix == ".jsonl" else _json(path)
        exchanges = {row["prompt"]: row for row in map(_exchange, rows)}  # some conversations begin alike
        by_language[language] = _split(_sample(_short(list(exchanges.values()), 500), 160), 24)
    together = {
        split: _sample([row for rows in by_language.values() for row in rows[split]], 10**6)
        for split in ("train", "search", "report")
    }
    return together | {f"report-{language}": rows["report"] for language, rows in by_language.items()}


def cola(sets: Path) -> dict[str, list[Row]]:
    """Sentences that are acceptable or not; the whole development set is reported."""
    train, dev = (
        [{"sentence1": line[3], "label": line[1]} for line in _tsv(sets / f"glue/CoLA/{split}.tsv")]
        for split in ("train", "dev")
    )
    return _dev_reported(train, dev)


def mrpc(sets: Path) -> dict[str, list[Row]]:
    """Pairs of sentences that say the same or do not; the whole development set is reported."""
    return _dev_reported(*(_pairs(sets / f"glue/MRPC/{split}.tsv", 3, 4, 0) for split in ("train", "dev")))


def rte(sets: Path) -> dict[str, list[Row]]:
    """Pairs of sentences of which the first entails the second or does not; the whole development set is reported."""
    return _dev_reported(*(_pairs(sets / f"glue/RTE/{split}.tsv", 1, 2, 3) for split in ("train", "dev")))


def stsb(sets: Path) -> dict[str, list[Row]]:
    """Pairs of sentences, and how alike they are, from 0 to 5; the whole development set is reported."""
    return _dev_reported(*(_pairs(sets / f"glue/STS-B/{split}.tsv", 7, 8, 9) for split in ("train", "dev")))


def sst2(sets: Path) -> dict[str, list[Row]]:
    """Phrases that praise or do not. The development set is cut into halves, because phrases of the training data are
    parts of one another."""
    train, dev = (
        [{"sentence1": line[0].strip(), "label": line[1]} for line in _tsv(sets / f"glue/SST-2/{split}.tsv")[1:]]
        for split in ("train", "dev")
    )
    return _halves(_sample(train, 8000), dev)


SETS: dict[str, Callable[[Path], dict[str, list[Row]]]] = {
    "e2e": e2e,
    "gsm8k": gsm8k,
    "metamathqa": metamathqa,
    "alpaca": alpaca,
    "multilingual": multilingual,
    "cola": cola,
    "mrpc": mrpc,
    "rte": rte,
    "sst2": sst2,
    "stsb": stsb,
}


def _exchange(row: dict[str, Any]) -> Row:
    if "messages" not in row:
        return _pair(f"{row['instruction']}\n{row['input']}".strip(), row["output"])
    said = [message["content"] for message in row["messages"] if message["role"] != "system"]
    return _pair(said[0], said[1])


def _pair(prompt: str, completion: str) -> Row:
    return {"prompt": prompt.strip() + "\n", "completion": completion.strip()}


def _asked(question: str, answer: str) -> Row:
    return {"prompt": f"Question: {question} Think step by step.\nAnswer:", "completion": answer}


def _short(rows: list[Row], most: int) -> list[Row]:
    return [row for row in rows if sum(len(text.encode()) for text in row.values()) <= most]


def _sample(rows: list[Row], most: int) -> list[Row]:
    return random.Random(0).sample(rows, min(most, len(rows)))


def _split(rows: list[Row], held_out: int) -> dict[str, list[Row]]:
    return {"train": rows[2 * held_out :], "search": rows[:held_out], "report": rows[held_out : 2 * held_out]}


def _dev_reported(train: list[Row], dev: list[Row]) -> dict[str, list[Row]]:
    train = _sample(train, 10**6)
    return {"train": train[HELD_OUT:], "search": train[:HELD_OUT], "report": dev}


def _halves(train: list[Row], dev: list[Row]) -> dict[str, list[Row]]:
    dev = _sample(dev, 10**6)
    return {"train": train, "search": dev[::2], "report": dev[1::2]}


def _pairs(path: Path, first: int, second: int, label: int) -> list[Row]:
    """Rows of a table with a header, by the numbers of its columns."""
    return [{"sentence1": row[first], "sentence2": row[second], "label": row[label]} for row in _tsv(path)[1:]]


def _tsv(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def _csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _json(path: Path) -> list[dict[str, Any]]:
    packed = path if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    data = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
    rows: list[dict[str, Any]] = json.loads(data)
    return rows


if __name__ == "__main__":
    main()
