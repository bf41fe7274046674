"""Held-out loss over answer tokens, and how many generated answers are right."""

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
from dora_dist.evaluation.evaluator import NUM_SHOWN, Evaluator, ShownAnswer, chunks
from dora_dist.evaluation.generation import generate
from dora_dist.evaluation.metrics import ANSWER_METRICS

GREEDY = {"do_sample": False}
"""Arguments of ``generate``: the most likely token."""
AnswerSums = tuple[float, int, int, tuple[int, ...], list[ShownAnswer]]
"""Sum of the losses, answer tokens, examples, right answers by each metric, and answers to look at."""


@dataclass(frozen=True, kw_only=True)
class AnswerEvaluator(Evaluator[AnswerSums]):
    """Of a causal language model.

    The loss is the mean over all answer tokens of the data (not a mean of means), so that it depends neither on batch
    size nor on world size. Metrics compare greedily generated answers with the trained ones, both as their tokens are
    decoded: what a template writes before an answer's text belongs to both.

    Args:
        tokenizer: the model's.
        metrics: of :data:`~dora_dist.evaluation.metrics.ANSWER_METRICS`; for none, nothing is generated, else the
            last answer of a conversation.
        max_new_tokens: longest generated answer, in tokens, where the model has as many positions.
        stop: tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    metrics: Sequence[str]
    max_new_tokens: int
    stop: Sequence[int]

    def share(self, examples: Dataset) -> list[range]:
        return list(chunks(range(self.agreement.rank, len(examples), self.agreement.size), self.batch_size))

    def join(self, parts: Sequence[AnswerSums]) -> AnswerSums:
        losses, tokens, examples, right, shown = zip(*parts, strict=True)
        counts = tuple(map(sum, zip(*right, strict=True)))
        return sum(losses), sum(tokens), sum(examples), counts, [answer for answers in shown for answer in answers]

    def figures(self, part: AnswerSums) -> dict[str, float]:
        loss, tokens, examples, right, _ = part
        shares = {name: count / examples for name, count in zip(self.metrics, right, strict=True)}
        return {"loss": loss / tokens, "examples": examples, **shares}

    def shown_of(self, part: AnswerSums) -> list[ShownAnswer]:
        return sorted(part[-1], key=lambda answer: answer.number)

    def measure(
        self, model: DynamicLoraForCausalLM, examples: Dataset, share: list[range], progress: tqdm
    ) -> AnswerSums:
        loss, tokens, right = 0.0, 0, [0] * len(self.metrics)
        shown: list[ShownAnswer] = []
        collate = PaddedCollator(self.tokenizer)
        for indices in share:
            rows = [examples[index] for index in indices]
            batch = {name: tensor.to(model.device) for name, tensor in collate([[as_example(r)] for r in rows]).items()}
            # With num_items_in_batch = 1 the model returns the sum over tokens.
            with model.loss_only():
                loss += float(model(**batch, num_items_in_batch=1).loss)
            tokens += int((batch["labels"] != IGNORED).sum())
            if self.metrics:
                prompts = [row["input_ids"][: row["answer_start"]] for row in rows]
                answers = generate_answers(model, self.tokenizer, prompts, self.max_new_tokens, self.stop)
                for index, prompt, row, answer in zip(indices, prompts, rows, answers, strict=True):
                    if index < NUM_SHOWN:
                        question = str(self.tokenizer.decode(prompt, skip_special_tokens=True))
                        shown.append(ShownAnswer.of(index, question, row["answer"], answer))
                for number, name in enumerate(self.metrics):
                    right[number] += sum(
                        ANSWER_METRICS[name](answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)
                    )
            progress.update(len(indices))
        return loss, tokens, sum(map(len, share)), tuple(right), shown


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

    An answer ends where the model has no more positions: behind them, tokens mean nothing. What a prompt is answered
    with does not depend on the others, so that one that comes near is answered apart from them.

    Args:
        model: causal language model.
        tokenizer: the model's.
        prompts: token ids; each leaves a position of the model for its answer.
        max_new_tokens: longest answer, in tokens.
        stop: tokens that end an answer.
        options: how the next token is chosen, and other arguments of ``generate``.
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
