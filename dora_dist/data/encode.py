"""Token ids and loss mask of examples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dora_dist.data.rows import Example

IGNORED = -100
"""Label of a position without loss, as in PyTorch's cross-entropy."""


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """Examples ready for training.

    Attributes:
        dataset: columns ``input_ids``, ``attention_mask``, ``labels`` (lists of ints of equal length in a row).
        examples: the examples behind its rows.
        num_dropped: examples left out because they were too long.
        trained_tokens: positions with a loss, over all rows.
        tokens: positions over all rows.
        digest: SHA-256 over ids and labels of all rows, in hexadecimal.
    """

    dataset: Dataset
    examples: list[Example]
    num_dropped: int
    trained_tokens: int
    tokens: int
    digest: str


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt as in training: with the tokenizer's start token, without an end token."""
    ids = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: str = "error"
) -> EncodedExamples:
    """Encode prompt and completion one after the other; the loss is on the completion and the end token.

    Args:
        examples: at least one.
        tokenizer: with an end-of-sequence token.
        max_length: longest row in tokens.
        overlong: ``error`` or ``drop``.

    Raises:
        ValueError: a row is too long under ``error``, none is left under ``drop``, or the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, so the model could not learn where to stop")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    kept: list[Example] = []
    digest = sha256()
    for number, example in enumerate(examples, start=1):
        prompt = encode_prompt(tokenizer, example.prompt)
        answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = prompt + answer
        if len(ids) > max_length:
            if overlong == "drop":
                continue
            raise ValueError(
                f"example {number} has {len(ids)} tokens, more than data.max_length {max_length}: raise it, or set "
                "data.overlong to drop"
            )
        rows["input_ids"].append(ids)
        rows["attention_mask"].append([1] * len(ids))
        rows["labels"].append([IGNORED] * len(prompt) + answer)
        digest.update(json.dumps([prompt, answer]).encode())
        kept.append(example)
    if not kept:
        raise ValueError(f"none of {len(examples)} examples is left at data.max_length {max_length}")
    return EncodedExamples(
        dataset=Dataset.from_dict(rows),
        examples=kept,
        num_dropped=len(examples) - len(kept),
        trained_tokens=sum(label != IGNORED for labels in rows["labels"] for label in labels),
        tokens=sum(map(len, rows["input_ids"])),
        digest=digest.hexdigest(),
    )
