"""The tasks a model can be tuned for: model class, row formats and metrics of each.

Plain values without torch, which keeps command lines fast. The parts of a run for a task are in
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

LOSS = "loss"
EXACT_MATCH = "exact_match"
FINAL_NUMBER = "final_number"


def lower_is_better(figure: str) -> bool:
    """Whether less is better of a held-out figure, such as ``loss``, ``SOURCE_loss`` or ``exact_match``."""
    return figure == LOSS or figure.endswith(f"_{LOSS}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of :data:`TASKS`.

    Attributes:
        name: value of the key ``task``.
        auto_class: transformers' class that loads a model for the task.
        peft_type: PEFT's name of the task.
        pipeline_tag: the Hub's name of the task.
        class_ending: ending of the names of transformers' classes for the task; empty if the endings differ.
        trains_head: whether the model has a task head, which is trained.
        has_labels: whether a row has one label, a class or a number as ``data.labels`` says.
        formats: formats of its rows, tried in this order; see :data:`~dora_dist.data.row_formats.FORMATS`.
        metrics: the :data:`METRICS` that ``evaluation.metrics`` can name.
        default_metrics: the metrics that are measured if ``evaluation.metrics`` is null.
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
"""Metrics of a task whose labels are numbers."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        title: the metric's name in a summary.
        style: format of the metric's value.
        about: what it is, in a sentence.
    """

    title: str
    style: str = ".4f"
    about: str = ""


METRICS = {
    EXACT_MATCH: Metric("exact match", ".1%", "The share of generated answers that equal the reference."),
    FINAL_NUMBER: Metric("final number", ".1%", "The share of generated answers that end with the reference's number."),
    "accuracy": Metric("accuracy", ".1%", "The share of right answers."),
    "matthews": Metric("Matthews", about="How far the labels agree with the right ones: 0 is chance, 1 is all."),
    "f1": Metric("F1", about="How precise and how complete the answers are, in one figure."),
    "pearson": Metric("Pearson", about="How closely the numbers follow the right ones: 0 is not at all, 1 is exactly."),
    "spearman": Metric("Spearman", about="How far the numbers have the order of the right ones: at most 1."),
    "rouge1": Metric("ROUGE-1", about="How many words the summaries share with the references."),
    "rouge2": Metric("ROUGE-2", about="How many pairs of words the summaries share with the references."),
    "rouge_l": Metric("ROUGE-L", about="How long a sequence of words the summaries share with the references."),
}
"""Metrics that can be measured beside the loss, in display order."""


def metrics_of(task: str, labels: str, wanted: list[str] | None) -> tuple[str, ...]:
    """The metrics that are measured beside the loss.

    Args:
        task: one of :data:`TASKS`.
        labels: ``data.labels``.
        wanted: ``evaluation.metrics``; None for the task's defaults.

    Raises:
        ValueError: a metric does not belong to this task, or is named twice.
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
