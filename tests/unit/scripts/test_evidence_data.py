"""The splits of the comparisons: nothing that is searched or reported on is trained on, or both."""

import csv
import json
import re

import evidence_data
import pytest
from support.mathematics import write_mathematics


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("mr", "ref"), *rows])


def test_the_held_out_splits_of_e2e_share_no_meaning(tmp_path):
    write_csv(tmp_path / "e2e/trainset.csv", [(f"name[T{n}]", "An inn.") for n in range(20)])
    write_csv(tmp_path / "e2e/devset.csv", [(f"name[D{n % 7}]", f"Inn {n}.") for n in range(40)])
    splits = evidence_data.e2e(tmp_path)
    prompts = {name: {row["prompt"] for row in rows} for name, rows in splits.items()}
    assert all(prompts.values())
    assert not prompts["search"] & prompts["report"]
    assert len(splits["search"]) + len(splits["report"]) == 40
    assert splits == evidence_data.e2e(tmp_path)


def test_a_development_set_is_cut_into_halves_and_quotes_are_text(tmp_path):
    folder = tmp_path / "glue/SST-2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text('sentence\tlabel\n"Who" left?\t1\n', encoding="utf-8")
    rows = "".join(f"S{n}\t{n % 2}\n" for n in range(10))
    (folder / "dev.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    splits = evidence_data.sst2(tmp_path)
    assert splits["train"] == [{"sentence1": '"Who" left?', "label": "1"}]
    halves = [{row["sentence1"] for row in splits[name]} for name in ("search", "report")]
    assert halves[0] | halves[1] == {f"S{n}" for n in range(10)}
    assert not halves[0] & halves[1]


def test_a_whole_development_set_is_reported_and_searched_is_a_part_of_the_training_data(tmp_path):
    folder = tmp_path / "glue/STS-B"
    folder.mkdir(parents=True)
    for split, count in (("train", 700), ("dev", 5)):
        rows = [f"{n}\t" + "x\t" * 6 + f"{split} {n}\tB {n}\t{n % 5}.0" for n in range(count)]
        (folder / f"{split}.tsv").write_text("\n".join(["header", *rows]), encoding="utf-8")
    splits = evidence_data.stsb(tmp_path)
    assert splits["report"] == [
        {"sentence1": f"dev {n}", "sentence2": f"B {n}", "label": f"{n % 5}.0"} for n in range(5)
    ]
    first = {name: {row["sentence1"] for row in splits[name]} for name in ("train", "search")}
    assert {name: len(texts) for name, texts in first.items()} == {"train": 400, "search": 300}
    assert first["train"] | first["search"] == {f"train {n}" for n in range(700)}


def test_nothing_that_is_made_from_a_searched_question_of_gsm8k_is_trained_on(tmp_path):
    write_mathematics(tmp_path / "sets", train=400, test=20)
    evidence_data.main([str(tmp_path / "sets"), str(tmp_path / "out"), "--only", "metamathqa"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metamathqa"]
    splits = {
        name: [json.loads(line) for line in (tmp_path / f"out/metamathqa/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "search", "report")
    }
    asked = {name: [int(re.search(r"\d+", row["prompt"])[0]) for row in rows] for name, rows in splits.items()}
    assert len(asked["search"]) == len(set(asked["search"])) == 300
    assert asked["train"] == sorted(set(range(400)) - set(asked["search"]))
    assert asked["report"] == list(range(400, 420))
    assert splits["train"][0] == {
        "prompt": f"Question: How does {asked['train'][0]} end? Think step by step.\nAnswer:",
        "completion": f"Look at it.\nThe answer is: {asked['train'][0] % 10}",
    }
    assert splits["report"][1] == {
        "prompt": "Question: What is the last digit of 401? Think step by step.\nAnswer:",
        "completion": "It is <<401%10=1>>1.\n#### 1",
    }


@pytest.mark.parametrize("name", sorted(evidence_data.SETS))
def test_no_row_is_in_two_splits_of_the_real_sets(name, shared, tmp_path):
    """Where the project's data are at hand; E2E's csv files are in an archive there."""
    data = shared / "data"
    if name in ("e2e", "metamathqa"):
        pytest.skip("it is not there, or in an archive that is not unpacked")
    links = {
        "gsm8k": data / "math/gsm8k",
        "glue": data / "glue",
        "alpaca_data.json.gz": data / "instruct/alpaca_data.json.gz",
    }
    languages = {"en": "en_best_replies", "fi": "fi_best_replies", "fr": "oasst_20230412_fr_top1"}
    links |= {f"multilingual/{code}.jsonl": data / f"instruct/multilingual/{f}.jsonl" for code, f in languages.items()}
    links["multilingual/zh.json.gz"] = data / "instruct/multilingual/alpaca_zh.json.gz"
    (tmp_path / "multilingual").mkdir()
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    splits = evidence_data.without_repetitions(evidence_data.SETS[name](tmp_path))
    seen = {split: {json.dumps({**row, "label": None}) for row in rows} for split, rows in splits.items()}
    assert all(seen.values())
    assert not seen["report"] & (seen["train"] | seen["search"])
    assert not seen["search"] & seen["train"]
    languages = [rows for split, rows in seen.items() if split.startswith("report-")]
    assert sum(map(len, languages)) == (len(seen["report"]) if name == "multilingual" else 0)
    assert set().union(*languages) <= seen["report"]
