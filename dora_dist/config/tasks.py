"""What a model can be tuned for: the class of the model, the formats of its rows, and what is measured.

Plain values, so that a command line is parsed without waiting for torch. What a run of a task is built from is in
:mod:`dora_dist.setup.tasks`.
"""

from dataclasses import dataclass
from typing import Literal

from dora_dist.config.checks import nearest

TaskName = Literal["causal_lm", "sequence_classification", "question_answering", "seq2seq"]
FormatName = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "text", "classification", "squad", "summary"
]

CAUSAL_LM: TaskName = "causal_lm"
SEQUENCE_CLASSIFICATION: TaskName = "sequence_classification"
QUESTION_ANSWERING: TaskName = "question_answering"
SEQ2SEQ: TaskName = "seq2seq"

EXACT_MATCH = "exact_match"
FINAL_NUMBER = "final_number"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of :data:`TASKS`.

    Attributes:
        name: value of the key ``task``.
        auto_class: transformers' class that loads a model for it.
        peft_type: PEFT's name of it.
        pipeline_tag: the Hub's name of it.
        class_ending: how names of transformers' classes for it end; empty where they have many endings.
        trains_head: whether the model has a head of the task's own, which is trained.
        has_labels: whether a row has one label, a class or a number as ``data.labels`` says.
        formats: formats that its rows can have, tried in this order; see
            :data:`~dora_dist.data.row_formats.FORMATS`.
        metrics: those of :data:`METRICS` that ``evaluation.metrics`` can name.
        default_metrics: those that are measured where ``evaluation.metrics`` is null.
    """

    name: TaskName
    auto_class: str
    peft_type: str
    pipeline_tag: str
    class_ending: str
    trains_head: bool
    has_labels: bool = False
    formats: tuple[FormatName, ...]
    metrics: tuple[str, ...] = ()
    default_metrics: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name=CAUSAL_LM,
            auto_class="AutoModelForCausalLM",
            peft_type="CAUSAL_LM",
            pipeline_tag="text-generation",
            class_ending="",
            trains_head=False,
            formats=("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
            metrics=(FINAL_NUMBER,),
        ),
        Task(
            name=SEQUENCE_CLASSIFICATION,
            auto_class="AutoModelForSequenceClassification",
            peft_type="SEQ_CLS",
            pipeline_tag="text-classification",
            class_ending="ForSequenceClassification",
            trains_head=True,
            has_labels=True,
            formats=("classification",),
            metrics=("accuracy", "matthews", "f1"),
            default_metrics=("accuracy", "matthews"),
        ),
        Task(
            name=QUESTION_ANSWERING,
            auto_class="AutoModelForQuestionAnswering",
            peft_type="QUESTION_ANS",
            pipeline_tag="question-answering",
            class_ending="ForQuestionAnswering",
            trains_head=True,
            formats=("squad",),
            metrics=(EXACT_MATCH, "f1"),
            default_metrics=(EXACT_MATCH, "f1"),
        ),
        Task(
            name=SEQ2SEQ,
            auto_class="AutoModelForSeq2SeqLM",
            peft_type="SEQ_2_SEQ_LM",
            pipeline_tag="summarization",
            class_ending="",
            trains_head=False,
            formats=("summary",),
            metrics=("rouge1", "rouge2", "rouge_l"),
            default_metrics=("rouge1", "rouge2", "rouge_l"),
        ),
    )
}
REGRESSION_METRICS = ("pearson", "spearman")
"""Metrics of a task with labels where these are numbers."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        title: its name in a summary.
        style: format of its value.
    """

    title: str
    style: str = ".4f"


METRICS = {
    EXACT_MATCH: Metric("exact match", ".1%"),
    FINAL_NUMBER: Metric("final number", ".1%"),
    "accuracy": Metric("accuracy", ".1%"),
    "matthews": Metric("Matthews"),
    "f1": Metric("F1"),
    "pearson": Metric("Pearson"),
    "spearman": Metric("Spearman"),
    "rouge1": Metric("ROUGE-1"),
    "rouge2": Metric("ROUGE-2"),
    "rouge_l": Metric("ROUGE-L"),
}
"""What can be measured beside the loss, in the order in which it is shown."""


def metrics_of(task: str, labels: str, wanted: list[str] | None) -> tuple[str, ...]:
    """Metrics that are measured beside the loss.

    Args:
        task: one of :data:`TASKS`.
        labels: ``data.labels``.
        wanted: ``evaluation.metrics``; None for the task's own.

    Raises:
        ValueError: one of them is not a metric of this task, or is there twice.
    """
    regression = labels == "regression"
    known = REGRESSION_METRICS if regression else TASKS[task].metrics
    if wanted is None:
        return REGRESSION_METRICS if regression else TASKS[task].default_metrics
    what = f"task {task} with data.labels regression" if regression else f"task {task}"
    for number, name in enumerate(wanted):
        if name not in known:
            raise ValueError(
                f"evaluation.metrics has {name!r}, but {what} has {', '.join(known) or 'none'}{nearest(name, known)}"
            )
        if name in wanted[:number]:
            raise ValueError(f"evaluation.metrics has {name!r} twice")
    return tuple(wanted)
