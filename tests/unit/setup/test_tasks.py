"""Tasks and formats: each name is known everywhere that it must be, and a new one needs no change elsewhere."""

import re
from typing import get_args

import pytest
import torch
from accelerate import PartialState
from support.repository import REPOSITORY
from support.tiny_encoders import save_tiny_encoder, write_rows

from dora_dist.config.data import DataConfig
from dora_dist.config.run import DistributedConfig, ModelConfig, RunConfig
from dora_dist.config.tasks import METRICS, REGRESSION_METRICS, TASKS, FormatName, Task, TaskName
from dora_dist.data.batches import labelled
from dora_dist.data.encoding.classification import LabelledEncoder
from dora_dist.data.reading.samples import Labelled
from dora_dist.data.row_formats import FORMATS, RowFormat
from dora_dist.distributed.agreement import Agreement
from dora_dist.setup import build, resolve, run_data
from dora_dist.setup.tasks import TASK_PARTS, SequenceClassificationParts


def test_every_task_has_a_name_and_parts():
    assert tuple(TASKS) == get_args(TaskName)
    assert tuple(TASK_PARTS) == get_args(TaskName)


def test_every_format_has_a_name_and_belongs_to_one_task():
    assert tuple(FORMATS) == get_args(FormatName)
    assert tuple(name for task in TASKS.values() for name in task.formats) == get_args(FormatName)


def test_every_metric_has_a_title():
    measured = {*REGRESSION_METRICS, *(name for task in TASKS.values() for name in task.metrics)}
    assert measured == set(METRICS)
    assert all(set(task.default_metrics) <= set(task.metrics) for task in TASKS.values())


def test_tasks_are_told_apart_by_name_in_few_files():
    """Those where a new task is described, where its class of model is chosen, and what works for some tasks only.
    Causal language modelling, for which some commands are, is not meant."""
    names = re.compile(r"\b(SEQUENCE_CLASSIFICATION|QUESTION_ANSWERING|SEQ2SEQ)\b|\"(seq2seq|question_answering)\"")
    package = REPOSITORY / "dora_dist"
    users = {str(p.relative_to(package)) for p in package.rglob("*.py") if names.search(p.read_text("utf-8"))}
    models = {"adapter/model.py", "base_model/head.py"}
    assert users <= {"config/tasks.py", "setup/tasks.py", "compare/plan.py"} | models


class ReviewEncoder(LabelledEncoder):
    """Reviews end in a word that no row has."""

    def _parts(self, sample: Labelled) -> list[Labelled]:
        return [Labelled(f"{sample.first} w39", None, sample.label)]


class StarsParts(SequenceClassificationParts):
    def reader(self, data):
        return labelled(["1", "2", "3"])

    num_outputs = 3


@pytest.fixture
def stars(monkeypatch, tmp_path):
    """A run of a new task, whose rows have a format of their own: a review with one to three stars."""
    monkeypatch.setitem(
        FORMATS,
        "review",
        RowFormat(
            required=("review", "stars"),
            parse=lambda row: Labelled(row["review"], None, row["stars"]),
            encoder=ReviewEncoder,
        ),
    )
    task = Task(
        name="stars",
        auto_class="AutoModelForSequenceClassification",
        peft_type="SEQ_CLS",
        pipeline_tag="text-classification",
        class_ending="ForSequenceClassification",
        trains_head=True,
        formats=("review",),
        metrics=("accuracy",),
        default_metrics=("accuracy",),
    )
    monkeypatch.setitem(TASKS, "stars", task)
    monkeypatch.setitem(TASK_PARTS, "stars", StarsParts())
    PartialState()
    rows = [{"review": f"w{number} w{number + 1}", "stars": 1 + number % 3} for number in range(30)]
    return RunConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(save_tiny_encoder(tmp_path / "model")), quantization="none"),
        data=DataConfig(
            train=write_rows(tmp_path / "train.jsonl", rows[:24]),
            eval=write_rows(tmp_path / "eval.jsonl", rows[24:]),
            cache_dir=str(tmp_path / "cache"),
            workers=1,
        ),
        task="stars",
        distributed=DistributedConfig(engine="none"),
        training={"max_steps": 12, "report_to": "none"},
    )


def test_a_new_task_needs_no_change_elsewhere(stars):
    tokenizer, data = run_data.read_data(stars)
    assert [source.format for source in (*data.train, *data.evaluation)] == ["review", "review"]
    resolved = resolve.resolve_run(stars, tokenizer, data)
    assert resolved.fingerprint.task == "stars"
    model = build.load_model(stars, torch.device("cpu"), tokenizer, data.labels)
    parts = TASK_PARTS[stars.task]
    (example,) = parts.training_rows(resolved)[0]
    assert example["input_ids"][-2] == tokenizer.convert_tokens_to_ids("w39")
    batch = parts.collator(stars, model, tokenizer)([[example]])
    outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    assert outputs.logits.shape == (1, 3)
    assert parts.row_losses(stars)(outputs, batch).shape == (1,)
    measured = parts.evaluator(stars, resolved, Agreement(), model)(model)
    assert (set(measured), measured["examples"]) == ({"loss", "examples", "accuracy"}, 6)
