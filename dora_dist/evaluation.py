"""Held-out loss and exact match, the same numbers on any number of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.agreement import Agreement
from dora_dist.data.encode import IGNORED, EncodedExamples, encode_prompt


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures a model on held-out examples, each rank on its share.

    The loss is the mean over all answer tokens of the data (not a mean of means), so that it depends neither on batch
    size nor on world size. Exact match compares greedily generated answers with the reference, white space stripped.

    Args:
        data: the held-out examples.
        tokenizer: the model's.
        agreement: collectives over the ranks.
        batch_size: examples at a time on a rank.
        exact_match: also generate answers.
        max_new_tokens: longest generated answer, in tokens.
    """

    data: EncodedExamples
    tokenizer: PreTrainedTokenizerBase
    agreement: Agreement
    batch_size: int
    exact_match: bool
    max_new_tokens: int

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """``loss``, ``exact_match`` (a share, if asked for) and ``examples``; the same on every rank.

        Raises:
            RankFailedError: a rank failed; on all ranks.
        """
        was_training = model.training
        model.eval()
        failure, local = None, (0.0, 0, 0)
        try:
            local = self._local_sums(model)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            model.train(was_training)
        self.agreement.raise_together(failure, "evaluation")
        loss, tokens, matches = (sum(values) for values in zip(*self.agreement.gather(local), strict=True))
        result = {"loss": loss / tokens, "examples": len(self.data.examples)}
        if self.exact_match:
            result["exact_match"] = matches / len(self.data.examples)
        return result

    def _local_sums(self, model: PreTrainedModel) -> tuple[float, int, int]:
        """Sum of the losses, number of answer tokens and number of exact matches of this rank's share."""
        share = range(self.agreement.rank, len(self.data.examples), self.agreement.size)
        loss, tokens, matches = 0.0, 0, 0
        collate = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        progress = tqdm(
            total=len(share),
            desc="evaluating",
            unit="example",
            leave=False,
            disable=None if self.agreement.rank == 0 else True,
        )
        with progress:
            for indices in _chunks(share, self.batch_size):
                batch = collate([self.data.dataset[index] for index in indices])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                # With num_items_in_batch = 1 the model returns the sum over tokens.
                loss += float(model(**batch, num_items_in_batch=1).loss)
                tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
                if self.exact_match:
                    examples = [self.data.examples[index] for index in indices]
                    prompts = [example.prompt for example in examples]
                    answers = generate_answers(model, self.tokenizer, prompts, self.max_new_tokens)
                    matches += sum(
                        answer.strip() == example.completion.strip()
                        for answer, example in zip(answers, examples, strict=True)
                    )
                progress.update(len(indices))
        return loss, tokens, matches


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers to prompts, without special tokens, in the same order."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _chunks(indices: range, size: int) -> Iterator[range]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
