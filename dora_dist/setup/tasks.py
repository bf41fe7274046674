"""What differs between tasks when a run is built. Names, formats and metrics are in :mod:`dora_dist.config.tasks`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dora_dist.adapter.model import DynamicLoraForCausalLM
from dora_dist.base_model.losses import RowLosses, class_losses, mean_over_tokens, span_losses, squared_errors
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM, QUESTION_ANSWERING, SEQ2SEQ, SEQUENCE_CLASSIFICATION
from dora_dist.data.batches import (
    ANSWER_SPANS,
    TARGETS,
    TRAINED_TOKENS,
    Collator,
    Example,
    FlattenedCollator,
    LabelledCollator,
    PackedCollator,
    PaddedCollator,
    PlannedRows,
    PredictingCollator,
    Reader,
    TargetCollator,
    labelled,
)
from dora_dist.data.encoding.chat import stop_tokens
from dora_dist.data.plan import plan_padded
from dora_dist.distributed.agreement import Agreement
from dora_dist.evaluation.answers import AnswerEvaluator
from dora_dist.evaluation.evaluator import Evaluator
from dora_dist.evaluation.labels import LabelEvaluator
from dora_dist.evaluation.packing import check_packing
from dora_dist.evaluation.questions import QuestionEvaluator, first_questions
from dora_dist.evaluation.summaries import SummaryEvaluator
from dora_dist.setup.resolve import ResolvedRun
from dora_dist.setup.run_data import RunData


class TaskParts(ABC):
    """The parts of a run that depend on its task; one subclass for each task.

    Attributes:
        num_outputs: outputs of the head, where it has none for classes.
    """

    num_outputs: ClassVar[int] = 1

    @abstractmethod
    def reader(self, data: RunData) -> Reader:
        """Makes an example of a stored row."""

    @abstractmethod
    def collator(self, config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Makes a batch of examples.

        Raises:
            ValueError: the model cannot be trained on such batches.
        """

    @abstractmethod
    def evaluator(self, config: RunConfig, resolved: ResolvedRun, agreement: Agreement, model: PeftModel) -> Evaluator:
        """Measures the model on the held-out data, of which there must be some."""

    def row_losses(self, config: RunConfig) -> RowLosses | None:
        """The loss of every row, where a row has one target; None where the loss is a mean over tokens."""
        return None

    def loss_over_tokens(self) -> Callable[..., Tensor] | None:
        """The Trainer's ``compute_loss_func``; None where the loss is of rows, or the model computes it itself."""
        return None

    def training_rows(self, resolved: ResolvedRun) -> PlannedRows:
        """All rows of the run in the order of training."""
        return PlannedRows(resolved.data.examples(), resolved.plan, self.reader(resolved.data))

    def scoring_rows(self, resolved: ResolvedRun) -> list[list[Example]]:
        """The examples that are held back to score components by, one a row."""
        plan = plan_padded(resolved.mixture.held_back)
        rows = PlannedRows(resolved.data.examples(), plan, self.reader(resolved.data))
        return [rows[number] for number in range(len(rows))]

    def _first_examples(self, examples: Dataset, most: int) -> Dataset:
        """The examples that are evaluated where there are at most ``most``."""
        return examples.take(min(most, len(examples)))

    def _held_out(self, config: RunConfig, resolved: ResolvedRun, agreement: Agreement) -> dict[str, Any]:
        """Arguments that evaluators of all tasks have."""
        most = config.evaluation.max_examples
        return {
            "sources": {
                source.name: source.dataset if most is None else self._first_examples(source.dataset, most)
                for source in resolved.data.evaluation
            },
            "agreement": agreement,
            "batch_size": resolved.arguments.per_device_eval_batch_size,
        }


class CausalLmParts(TaskParts):
    """The model continues a text, and computes its loss itself."""

    def reader(self, data: RunData) -> Reader:
        return TRAINED_TOKENS

    def collator(self, config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """One example a row, or several, which must not see each other in this model."""
        collator: Collator = PaddedCollator(tokenizer)
        if config.data.batching == "packed":
            base: Any = model.get_base_model()
            flat = "flash" in str(base.config._attn_implementation)
            collator = FlattenedCollator() if flat else PackedCollator(tokenizer)
            check_packing(base, collator)
        # A model of PEFT's own class would hand what it does not know on to its layers.
        return PredictingCollator(collator) if isinstance(model, DynamicLoraForCausalLM) else collator

    def evaluator(
        self, config: RunConfig, resolved: ResolvedRun, agreement: Agreement, model: PeftModel
    ) -> AnswerEvaluator:
        return AnswerEvaluator(
            **self._held_out(config, resolved, agreement),
            tokenizer=resolved.tokenizer,
            metrics=config.measured,
            max_new_tokens=config.evaluation.max_new_tokens,
            stop=stop_tokens(resolved.tokenizer, resolved.data.template),
        )


def _labelled_collator(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> LabelledCollator:
    """Batches for a model with a head. Many tokenizers tell two texts apart for models that have no embedding for it:
    token types are given only where both know them."""
    knows_types = getattr(model.config, "type_vocab_size", 0) > 1
    return LabelledCollator(tokenizer, with_types=knows_types and "token_type_ids" in tokenizer.model_input_names)


class SequenceClassificationParts(TaskParts):
    """The head gives a row one output for every class, or a number."""

    def reader(self, data: RunData) -> Reader:
        return labelled(data.labels)

    def collator(self, config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> LabelledCollator:
        return _labelled_collator(model, tokenizer)

    def evaluator(
        self, config: RunConfig, resolved: ResolvedRun, agreement: Agreement, model: PeftModel
    ) -> LabelEvaluator:
        return LabelEvaluator(
            **self._held_out(config, resolved, agreement),
            reader=self.reader(resolved.data),
            collate=self.collator(config, model, resolved.tokenizer),
            row_losses=self.row_losses(config),
            metrics=config.measured,
            regression=config.data.labels == "regression",
        )

    def row_losses(self, config: RunConfig) -> RowLosses:
        return squared_errors if config.data.labels == "regression" else class_losses


class QuestionAnsweringParts(TaskParts):
    """The head gives every token of a row two outputs: whether the answer starts there, and whether it ends there."""

    num_outputs = 2

    def reader(self, data: RunData) -> Reader:
        return ANSWER_SPANS

    def collator(self, config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> LabelledCollator:
        return _labelled_collator(model, tokenizer)

    def evaluator(
        self, config: RunConfig, resolved: ResolvedRun, agreement: Agreement, model: PeftModel
    ) -> QuestionEvaluator:
        return QuestionEvaluator(
            **self._held_out(config, resolved, agreement),
            collate=self.collator(config, model, resolved.tokenizer),
            metrics=config.measured,
            with_no_answer=resolved.data.some_have_no_answer(),
        )

    def row_losses(self, config: RunConfig) -> RowLosses:
        return span_losses

    def _first_examples(self, examples: Dataset, most: int) -> Dataset:
        return first_questions(examples, most)


class Seq2SeqParts(TaskParts):
    """The decoder writes a text about the one that the encoder reads."""

    def reader(self, data: RunData) -> Reader:
        return TARGETS

    def collator(self, config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> TargetCollator:
        base: Any = model.get_base_model()
        if not hasattr(base, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(
                f"{type(base).__name__} does not say how its decoder's input is made of labels, as BART and T5 do: "
                f"task {SEQ2SEQ} needs a model that does"
            )
        return TargetCollator(tokenizer, base.prepare_decoder_input_ids_from_labels)

    def evaluator(
        self, config: RunConfig, resolved: ResolvedRun, agreement: Agreement, model: PeftModel
    ) -> SummaryEvaluator:
        return SummaryEvaluator(
            **self._held_out(config, resolved, agreement),
            tokenizer=resolved.tokenizer,
            collate=self.collator(config, model, resolved.tokenizer),
            metrics=config.measured,
            max_new_tokens=config.evaluation.max_new_tokens,
            num_beams=config.evaluation.num_beams,
        )

    def loss_over_tokens(self) -> Callable[..., Tensor]:
        return mean_over_tokens


TASK_PARTS: dict[str, TaskParts] = {
    CAUSAL_LM: CausalLmParts(),
    SEQUENCE_CLASSIFICATION: SequenceClassificationParts(),
    QUESTION_ANSWERING: QuestionAnsweringParts(),
    SEQ2SEQ: Seq2SeqParts(),
}
"""The parts of every task of :data:`~dora_dist.config.tasks.TASKS`, by its name."""
