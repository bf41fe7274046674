"""Held-out loss over answer tokens, and exact match of generated answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dora_dist.adapter.model import DynamicLoraForCausalLM
from dora_dist.data.batches import PaddedCollator, as_example
from dora_dist.data.encoding.encoder import IGNORED
from dora_dist.data.encoding.text import prompt_length
from dora_dist.evaluation.evaluator import Evaluator, chunks

AnswerSums = tuple[float, int, int, int]
"""Sum of the losses, answer tokens, exact matches, examples."""


@dataclass(frozen=True, kw_only=True)
class AnswerEvaluator(Evaluator[AnswerSums]):
    """Of a causal language model.

    The loss is the mean over all answer tokens of the data (not a mean of means), so that it depends neither on batch
    size nor on world size. Exact match compares greedily generated answers with the trained ones, both as their tokens
    are decoded, white space stripped: what a template writes before an answer's text belongs to both.

    Args:
        tokenizer: the model's.
        exact_match: also generate answers (the last one of a conversation).
        max_new_tokens: longest generated answer, in tokens.
        stop: tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    exact_match: bool
    max_new_tokens: int
    stop: Sequence[int]

    def share(self, examples: Dataset) -> list[range]:
        return list(chunks(range(self.agreement.rank, len(examples), self.agreement.size), self.batch_size))

    def join(self, parts: Sequence[AnswerSums]) -> AnswerSums:
        loss, tokens, matches, examples = (sum(values) for values in zip(*parts, strict=True))
        return loss, tokens, matches, examples

    def figures(self, part: AnswerSums) -> dict[str, float]:
        loss, tokens, matches, examples = part
        exact_match = {"exact_match": matches / examples} if self.exact_match else {}
        return {"loss": loss / tokens, "examples": examples, **exact_match}

    def measure(
        self, model: DynamicLoraForCausalLM, examples: Dataset, share: list[range], progress: tqdm
    ) -> AnswerSums:
        loss, tokens, matches = 0.0, 0, 0
        collate = PaddedCollator(self.tokenizer)
        for indices in share:
            rows = [examples[index] for index in indices]
            batch = {name: tensor.to(model.device) for name, tensor in collate([[as_example(r)] for r in rows]).items()}
            # With num_items_in_batch = 1 the model returns the sum over tokens.
            with model.loss_only():
                loss += float(model(**batch, num_items_in_batch=1).loss)
            tokens += int((batch["labels"] != IGNORED).sum())
            if self.exact_match:
                prompts = [row["input_ids"][: prompt_length(row["spans"])] for row in rows]
                answers = generate_answers(model, self.tokenizer, prompts, self.max_new_tokens, self.stop)
                matches += sum(
                    answer.strip() == row["answer"].strip() for answer, row in zip(answers, rows, strict=True)
                )
            progress.update(len(indices))
        return loss, tokens, matches, sum(map(len, share))


@torch.no_grad()
def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int],
) -> list[str]:
    """Greedy answers to prompts, without special tokens, in the same order.

    Args:
        model: causal language model.
        tokenizer: the model's.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens.
        stop: tokens that end an answer.
    """
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=list(stop),
    )
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts
