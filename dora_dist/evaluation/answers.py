"""Held-out loss over answer tokens, and how many generated answers are right."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dora_dist.adapter.model import DynamicLoraForCausalLM
from dora_dist.base_model.shape import positions_of
from dora_dist.data.batches import PaddedCollator, as_example
from dora_dist.data.encoding.encoder import IGNORED
from dora_dist.evaluation.evaluator import NUM_SHOWN, Evaluator, ShownAnswer
from dora_dist.evaluation.generation import generate
from dora_dist.evaluation.metrics import ANSWER_METRICS

GREEDY = {"do_sample": False}
"""Arguments of ``generate`` that take the most likely token."""
Outcome = tuple[int, float, int, int, tuple[int, ...], list[ShownAnswer]]
"""Outcome of one batch: its first index, sum of the losses, number of answer tokens and of examples, number of right
answers by each metric, and answers to look at."""


@dataclass(frozen=True, kw_only=True)
class AnswerEvaluator(Evaluator):
    """Measures a causal language model.

    The loss is the mean over all answer tokens of the data (not a mean of means), so that it depends neither on batch
    size nor on world size. Metrics compare greedily generated answers with the trained ones, both as their tokens are
    decoded: what a template writes before an answer's text belongs to both.

    Args:
        tokenizer: the model's.
        metrics: names of :data:`~dora_dist.evaluation.metrics.ANSWER_METRICS`. Where there are some, the last answer of
            every conversation is generated.
        max_new_tokens: longest generated answer, in tokens, where the model has as many positions.
        stop: tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    metrics: Sequence[str]
    max_new_tokens: int
    stop: Sequence[int]

    def figures(self, part: list[Outcome]) -> dict[str, float]:
        _, losses, tokens, sizes, right, _ = zip(*part, strict=True)
        examples = sum(sizes)
        counts = map(sum, zip(*right, strict=True))
        shares = {name: count / examples for name, count in zip(self.metrics, counts, strict=True)}
        return {"loss": math.fsum(losses) / sum(tokens), "examples": examples, **shares}

    def shown_of(self, part: list[Outcome]) -> list[ShownAnswer]:
        return [answer for *_, shown in part for answer in shown]

    def measure(
        self, model: DynamicLoraForCausalLM, examples: Dataset, share: list[range], progress: tqdm
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        collate = PaddedCollator(self.tokenizer)
        for indices in share:
            rows = [examples[index] for index in indices]
            batch = {name: tensor.to(model.device) for name, tensor in collate([[as_example(r)] for r in rows]).items()}
            # With num_items_in_batch = 1 the model returns the sum over tokens.
            with model.loss_only():
                loss = float(model(**batch, num_items_in_batch=1).loss)
            right, shown = self._judged(model, indices, rows) if self.metrics else ((), [])
            outcomes.append((indices[0], loss, int((batch["labels"] != IGNORED).sum()), len(rows), right, shown))
            progress.update(len(indices))
        return outcomes

    def _judged(
        self, model: DynamicLoraForCausalLM, indices: range, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[tuple[int, ...], list[ShownAnswer]]:
        """Number of generated answers of a batch that are right by each metric, and those to look at."""
        prompts = [row["input_ids"][: row["answer_start"]] for row in rows]
        answers = generate_answers(model, self.tokenizer, prompts, self.max_new_tokens, self.stop)
        right = tuple(
            sum(ANSWER_METRICS[name](answer, row["answer"]) for answer, row in zip(answers, rows, strict=True))
            for name in self.metrics
        )
        shown = []
        for index, prompt, row, answer in zip(indices, prompts, rows, answers, strict=True):
            if index < NUM_SHOWN:
                question = str(self.tokenizer.decode(prompt, skip_special_tokens=True))
                shown.append(ShownAnswer.of(index, question, row["answer"], answer))
        return right, shown


@torch.no_grad()
def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int],
    options: Mapping[str, Any] = GREEDY,
) -> list[str]:
    """Answers to prompts, without special tokens, in the same order.

    An answer ends where the model has no more positions: behind them, tokens mean nothing. Prompts that leave too few
    of them for ``max_new_tokens`` are answered apart, so that they do not shorten the answers to others.

    Args:
        model: the causal language model.
        tokenizer: the model's.
        prompts: token ids; each leaves a position of the model for its answer.
        max_new_tokens: longest answer, in tokens.
        stop: tokens that end an answer.
        options: arguments of ``generate``, such as how the next token is chosen.
    """
    context = positions_of(model.config)
    together: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
        together.setdefault(room, []).append(number)
    texts: dict[int, str] = {}
    for room, numbers in together.items():
        batch = [prompts[number] for number in numbers]
        texts.update(zip(numbers, _batch_of_answers(model, tokenizer, batch, room, stop, options), strict=True))
    return [texts[number] for number in range(len(prompts))]


def _batch_of_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int],
    options: Mapping[str, Any],
) -> list[str]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    output = generate(
        model,
        input_ids=ids,
        attention_mask=mask,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(stop),
        **options,
    )
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts
