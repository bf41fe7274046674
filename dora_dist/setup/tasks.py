"""What differs between tasks."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.losses import RowLosses, class_losses, span_losses, squared_errors
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM, QUESTION_ANSWERING, SEQ2SEQ, SEQUENCE_CLASSIFICATION, TASKS, metrics_of
from dora_dist.data.batches import (
    ANSWER_SPANS,
    TARGETS,
    TRAINED_TOKENS,
    Collator,
    FlattenedCollator,
    LabelledCollator,
    PackedCollator,
    PaddedCollator,
    PlannedRows,
    TargetCollator,
    labelled,
)
from dora_dist.data.encoding.chat import stop_tokens
from dora_dist.distributed.agreement import Agreement
from dora_dist.evaluation.answers import AnswerEvaluator
from dora_dist.evaluation.evaluator import Evaluator
from dora_dist.evaluation.labels import LabelEvaluator
from dora_dist.evaluation.packing import check_packing
from dora_dist.evaluation.questions import QuestionEvaluator, first_questions
from dora_dist.evaluation.summaries import SummaryEvaluator
from dora_dist.setup.resolve import ResolvedRun


def build_evaluator(
    config: RunConfig, resolved: ResolvedRun, agreement: Agreement, model: DynamicLoraModel
) -> Evaluator[Any] | None:
    """The measurement on held-out data, or None where there is none."""
    if not resolved.data.evaluation:
        return None
    most = config.evaluation.max_examples
    take = first_questions if config.task == QUESTION_ANSWERING else _first_examples
    common: dict[str, Any] = {
        "sources": {
            source.name: source.dataset if most is None else take(source.dataset, most)
            for source in resolved.data.evaluation
        },
        "agreement": agreement,
        "batch_size": resolved.arguments.per_device_eval_batch_size,
    }
    if config.task == CAUSAL_LM:
        return AnswerEvaluator(
            **common,
            tokenizer=resolved.tokenizer,
            exact_match=config.evaluation.exact_match,
            max_new_tokens=config.evaluation.max_new_tokens,
            stop=stop_tokens(resolved.tokenizer, resolved.data.template),
        )
    common |= {
        "collate": build_collator(config, model, resolved.tokenizer),
        "metrics": metrics_of(config.task, config.data.labels, config.evaluation.metrics),
    }
    if config.task == QUESTION_ANSWERING:
        return QuestionEvaluator(**common, with_no_answer=resolved.data.some_have_no_answer())
    if config.task == SEQ2SEQ:
        return SummaryEvaluator(
            **common,
            tokenizer=resolved.tokenizer,
            max_new_tokens=config.evaluation.max_new_tokens,
            num_beams=config.evaluation.num_beams,
        )
    return LabelEvaluator(
        **common,
        reader=labelled(resolved.data.labels),
        row_losses=row_losses(config),
        regression=config.data.labels == "regression",
    )


def _first_examples(examples: Dataset, most: int) -> Dataset:
    return examples.take(min(most, len(examples)))


def tells_texts_apart(model: DynamicLoraModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether both the model and its tokenizer know which of two texts a token belongs to. Many tokenizers say so to
    models that have no embedding for it."""
    return "token_type_ids" in tokenizer.model_input_names and getattr(model.config, "type_vocab_size", 0) > 1


def planned_rows(config: RunConfig, resolved: ResolvedRun) -> PlannedRows:
    """What is trained on, in the order of training."""
    readers = {
        CAUSAL_LM: TRAINED_TOKENS,
        SEQUENCE_CLASSIFICATION: labelled(resolved.data.labels),
        QUESTION_ANSWERING: ANSWER_SPANS,
        SEQ2SEQ: TARGETS,
    }
    return PlannedRows(resolved.data.examples(), resolved.plan, readers[config.task])


def row_losses(config: RunConfig) -> RowLosses | None:
    """The loss of a row, of tasks that have one target a row."""
    if config.task == QUESTION_ANSWERING:
        return span_losses
    if config.task != SEQUENCE_CLASSIFICATION:
        return None
    return squared_errors if config.data.labels == "regression" else class_losses


def build_collator(config: RunConfig, model: DynamicLoraModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
    """What makes batches of rows, for the task and the model's attention.

    Raises:
        ValueError: examples of one row would see each other in this model, or it cannot be given labels.
    """
    base = model.get_base_model()
    if TASKS[config.task].trains_head:
        return LabelledCollator(tokenizer, with_types=tells_texts_apart(model, tokenizer))
    if config.task == SEQ2SEQ:
        if not hasattr(base, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(
                f"{type(base).__name__} does not say how its decoder's input is made of labels, as BART and T5 do: "
                f"task {SEQ2SEQ} needs a model that does"
            )
        return TargetCollator(tokenizer, base.prepare_decoder_input_ids_from_labels)
    if config.data.batching != "packed":
        return PaddedCollator(tokenizer)
    if "flash" in str(base.config._attn_implementation):
        collator: Collator = FlattenedCollator()
    else:
        collator = PackedCollator(tokenizer)
    check_packing(base, collator)
    return collator
