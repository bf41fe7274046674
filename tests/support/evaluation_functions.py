"""What ranks run in the tests of evaluations."""

from typing import Any

import torch
from datasets import Dataset

from dora_dist.distributed.agreement import Agreement
from dora_dist.evaluation.answers import AnswerEvaluator
from support.tiny_models import VOCABULARY, adapt, shake, tiny_model, tokens
from support.tiny_tokenizer import word_tokenizer


def evaluate_answers(num_examples: int, metrics: list[str], failing: list[int]) -> dict[str, Any]:
    """Figures of a tiny model on examples of different lengths, two at a time; memory runs out on some ranks."""
    tokenizer = word_tokenizer(" ".join(f"{number}" for number in range(100, 100 + VOCABULARY)))
    rows = []
    for number in range(num_examples):
        prompt = tokens(1, 3 + number % 4, seed=number)[0].tolist()
        row = {"input_ids": [*prompt, 5, 6], "spans": [len(prompt), len(prompt) + 2]}
        rows.append({**row, "answer_start": len(prompt), "answer": str(number)})
    evaluator = AnswerEvaluator(
        sources={"eval": Dataset.from_list(rows)},
        agreement=Agreement(),
        batch_size=2,
        tokenizer=tokenizer,
        metrics=metrics,
        max_new_tokens=3,
        stop=[2],
    )
    model = shake(adapt(tiny_model(num_hidden_layers=1)))
    if evaluator.agreement.rank in failing:
        model.get_base_model().register_forward_pre_hook(_run_out_of_memory)
    return {"figures": evaluator(model), "shown": evaluator.shown}


def _run_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
