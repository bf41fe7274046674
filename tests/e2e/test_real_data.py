"""Real instruction data of every kind trains the small pretrained LLaMA for a few steps, two ranks under ZeRO-2."""

import json
from collections import Counter
from pathlib import Path

import pytest
from support.forked_run import log_of, run_forked, start_run
from support.ranks import wait_for_ranks
from support.tiny_run import write_config

pytestmark = pytest.mark.full("data")
MGSM = "bn de en es fr ja ru sw te th zh".split()


def gsm8k(shared: Path) -> dict:
    fields = {"prompt": "question", "completion": "answer"}
    folder = shared / "data/math/gsm8k"
    return {
        "train": [{"path": str(folder / "train.jsonl"), "fields": fields, "max_rows": 300}],
        "eval": [{"path": str(folder / "test.jsonl"), "fields": fields, "max_rows": 20}],
        "overlong": "drop",
    }


def alpaca(shared: Path) -> dict:
    path = str(shared / "data/instruct/alpaca_data.json.gz")
    return {"train": [{"path": path, "max_rows": 400, "as_chat": True}], "bad_rows": "skip", "overlong": "truncate"}


def chinese(shared: Path) -> dict:
    path = str(shared / "data/instruct/multilingual/alpaca_zh.json.gz")
    return {"train": [{"path": path, "max_rows": 300}], "batching": "by_length", "overlong": "drop", "bad_rows": "skip"}


def conversations(shared: Path) -> dict:
    folder = shared / "data/instruct/multilingual"
    names = {"en": "en_best_replies", "fi": "fi_best_replies", "fr": "oasst_20230412_fr_top1"}
    sources = [{"path": str(folder / f"{file}.jsonl"), "name": name} for name, file in names.items()]
    return {"train": sources, "temperature": 2.0, "batching": "packed", "overlong": "truncate"}


def eleven_languages(shared: Path) -> dict:
    folder, columns = shared / "data/math/mgsm", ["prompt", "completion"]
    sources = [{"path": str(folder / f"mgsm_{name}.tsv"), "name": name, "columns": columns} for name in MGSM]
    return {"train": sources, "eval": [{**source, "max_rows": 3} for source in sources], "overlong": "drop"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("kind", [alpaca, gsm8k, chinese, conversations, eleven_languages], ids=lambda f: f.__name__)
def test_it_trains(kind, shared, cache, tmp_path):
    config = write_config(
        tmp_path,
        model={"path": str(shared / "data/models/stories260K")},
        data={"eval": None, "max_length": 512, "cache_dir": str(cache), **kind(shared)},
        training={"max_steps": 8, "save_steps": 100},
    )
    wait_for_ranks(start_run(config, tmp_path / "run", tmp_path / "log"), timeout=150)
    assert (tmp_path / "run" / "adapter").is_dir(), log_of(tmp_path / "log")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 9))
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    for source in recorded["train"]:
        assert source["rows"] == source["examples"] + source["bad"] + source["overlong"]
        assert source["trained_tokens"] < source["tokens"]
    checks = {alpaca: check_alpaca, conversations: check_conversations, eleven_languages: check_languages}
    if kind in checks:
        checks[kind](recorded, steps, log_of(tmp_path / "log"))


def check_alpaca(recorded: dict, steps: list[dict], log: str) -> None:
    (source,) = recorded["train"]
    assert source["bad"] > 0, "some of these rows have no output"
    assert f"skipped {source['bad']} of 400 rows" in log
    assert "the tokenizer has no chat template: taking the bundled one for plain" in log


def check_conversations(recorded: dict, steps: list[dict], log: str) -> None:
    assert recorded["padding_share"] < 0.15, "long rows leave little room for others, but some"
    counts = {source["name"]: source["per_epoch"] for source in recorded["train"]}
    # 480 ** 0.5 : 480 ** 0.5 : 256 ** 0.5 of the examples, less what does not fit.
    assert counts["fr"] / counts["en"] == pytest.approx((256 / 480) ** 0.5, rel=0.1)
    assert sum(source["truncated"] for source in recorded["train"]) > 0


def check_languages(recorded: dict, steps: list[dict], log: str) -> None:
    last = [line for line in steps if "eval_loss" in line][-1]
    assert Counter(name for name in MGSM if f"eval_{name}_loss" in last) == Counter(MGSM)


def test_rows_without_a_known_format_are_refused_with_their_fields(shared, tmp_path):
    path = str(shared / "data/instruct/multilingual/seed_tasks_vigogne.jsonl")
    config = write_config(tmp_path, data={"train": path})
    finished = run_forked("prepare", str(config))
    assert finished.status == 2
    assert "the fields id, instances, instruction," in finished.output
    assert "Traceback" not in finished.output
