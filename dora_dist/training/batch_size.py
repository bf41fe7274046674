"""Rows of an optimizer step."""

from transformers import TrainingArguments


def global_batch(arguments: TrainingArguments, world_size: int) -> int:
    """Rows of one optimizer step, over all ranks and micro-batches."""
    rows: int = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world_size
    return rows
