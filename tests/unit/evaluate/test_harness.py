"""The command on a task of one's own, with the real lm-eval, against likelihoods that are computed here."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.tiny_models import load_base
from support.trained_run import TrainedFolder, character_tokenizer, make_base, make_run, one_thread, write_use

from dora_dist.data.encoding.chat import choose_template
from dora_dist.evaluate import __main__ as command
from dora_dist.runs.task_figures import paired_error

pytestmark = pytest.mark.full("evaluate")
CHOICES = ["red", "blue green", "no"]
ROWS = [{"question": f"What is {n * 7919}?", "answer": n % 3} for n in range(12)]


@pytest.fixture(scope="module", autouse=True)
def harness() -> Iterator[None]:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install dora-dist[evaluate]")
    with one_thread():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolder:
    folder = tmp_path_factory.mktemp("evaluate")
    made = make_run(folder / "run", make_base(folder / "base"))
    tokenizer = character_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    tokenizer.save_pretrained(made.folder / "adapter")
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks: which choice is the likeliest, and how likely a text is."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "choices": CHOICES}) + "\n" for row in ROWS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    asked = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    choice = {
        "task": "colours",
        "output_type": "multiple_choice",
        **common,
        **asked,
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        **{"task": "texts", "output_type": "loglikelihood_rolling", **common},
        **{"doc_to_text": "", "doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}]},
    }
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@torch.no_grad()
def likelihood(model, before: list[int], ids: list[int]) -> float:
    """Log-likelihood of token ids behind others."""
    logits = model(input_ids=torch.tensor([before + ids])).logits[0].log_softmax(-1)
    return sum(float(logits[len(before) + place - 1, token]) for place, token in enumerate(ids))


def right(model, prompts: list[list[int]]) -> dict[int, float]:
    """Number of a row -> whether the likeliest of its choices is the answer."""
    tokenizer = character_tokenizer()
    found = {}
    for number, (row, prompt) in enumerate(zip(ROWS, prompts, strict=True)):
        choices = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in CHOICES]
        scores = [likelihood(model, prompt, ids) for ids in choices]
        found[number] = float(scores.index(max(scores)) == row["answer"])
    return found


def evaluate(run: TrainedFolder, tasks: Path, *options: str) -> dict[str, dict]:
    """Figures by task, from the file that the command writes."""
    output = tasks / "result.json"
    command.main([str(run.folder), "--include-path", str(tasks), "--output", str(output), *options])
    return {figure["task"]: figure for figure in json.loads(output.read_text())["figures"]}


def test_figures_are_those_of_our_own_likelihoods(run, tasks, capsys):
    figures = evaluate(run, tasks, "--tasks", "colours,texts", "--batch-size", "3")
    table = capsys.readouterr().out
    tokenizer, models = character_tokenizer(), {"base": load_base(run.base), "adapter": run.model.eval()}
    prompts = [tokenizer(row["question"])["input_ids"] for row in ROWS]
    found = {name: right(model, prompts) for name, model in models.items()}
    means = [sum(values.values()) / len(ROWS) for values in found.values()]
    colours, texts = figures["colours"], figures["texts"]
    assert [colours["base"], colours["adapter"]] == pytest.approx(means)
    assert colours["difference_error"] == paired_error(*found.values(), *means)
    assert colours["examples"] == len(ROWS)
    for name, model in models.items():
        # The harness puts the start token before what the tokenizer has made of the text, its own start token included.
        total = sum(likelihood(model, [tokenizer.bos_token_id], prompt) for prompt in prompts)
        bits = -total / math.log(2) / sum(len(row["question"].encode()) for row in ROWS)
        assert texts[name] == pytest.approx(bits, rel=1e-4), name
    assert texts["base"] != pytest.approx(texts["adapter"], rel=1e-3), (
        "the adapter changes nothing, and this test shows nothing"
    )
    assert f"{colours['base']:.4f}" in table
    line = json.loads((run.folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert line["environment"]["versions"]["lm-eval"] != "not installed"
    assert "## Tasks" in (run.folder / "adapter" / "README.md").read_text()


def test_an_adapter_without_its_run_has_the_same_figures_and_nothing_is_written_beside_it(run, tasks, tmp_path):
    wanted = evaluate(run, tasks, "--tasks", "colours")
    copied = Path(shutil.copytree(run.folder / "adapter", tmp_path / "copy"))
    write_use(run.folder, copied)
    there = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert evaluate(replace(run, folder=copied), tasks, "--tasks", "colours") == wanted
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == there


def test_a_chat_template_is_put_around_and_a_limit_takes_the_first_examples(run, tasks):
    figures = evaluate(run, tasks, "--tasks", "colours", "--chat", "--limit", "5")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True, return_dict=False
        )
        for row in ROWS
    ]
    found = list(right(run.model.eval(), prompts).values())[:5]
    assert figures["colours"]["adapter"] == pytest.approx(sum(found) / 5)
    assert figures["colours"]["examples"] == 5


def test_a_task_whose_data_are_not_there_is_refused_before_the_model_is_read(run, tmp_path):
    (tmp_path / "lost.yaml").write_text(
        yaml.safe_dump(
            {
                **{"task": "lost", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
                **{"dataset_kwargs": {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}, "doc_to_text": "a"},
                **{"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
            }
        )
    )
    with pytest.raises(ValueError, match=r"--tasks has 'lost', which cannot be loaded: .*nowhere"):
        command.main([str(run.folder), "--include-path", str(tmp_path), "--tasks", "lost"])


def test_an_unknown_task_is_refused_with_the_nearest_name(run, tasks):
    with pytest.raises(ValueError, match=r"--tasks has 'colour', which lm-eval does not know; did you mean colours\?"):
        command.main([str(run.folder), "--include-path", str(tasks), "--tasks", "colour"])
