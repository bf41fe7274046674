"""Rows of an optimizer step."""

from transformers import TrainingArguments


def global_batch(arguments: TrainingArguments) -> int:
    """Rows of one optimizer step, over all ranks and micro-batches."""
    rows: int = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return rows
