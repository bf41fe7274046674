"""Held-out loss and exact match, the same numbers on any number of ranks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.agreement import Agreement
from dora_dist.data.batches import Collator, PaddedCollator, as_example
from dora_dist.data.encode import IGNORED, prompt_length
from dora_dist.model import DynamicLoraModel

LEAST_SEPARATION = 0.05
"""How much of what another example changes in an unseparated row may be left in a packed one."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures a model on held-out examples, each rank on its share.

    The loss is the mean over all answer tokens of the data (not a mean of means), so that it depends neither on batch
    size nor on world size. Exact match compares greedily generated answers with the reference, white space stripped.

    Args:
        sources: held-out examples by the name of their source.
        tokenizer: the model's.
        agreement: collectives over the ranks.
        batch_size: examples at a time on a rank.
        exact_match: also generate answers (the last one of a conversation).
        max_new_tokens: longest generated answer, in tokens.
        stop: tokens that end an answer.
    """

    sources: Mapping[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    agreement: Agreement
    batch_size: int
    exact_match: bool
    max_new_tokens: int
    stop: Sequence[int]

    @torch.no_grad()
    def __call__(self, model: DynamicLoraModel) -> dict[str, float]:
        """``loss``, ``exact_match`` (a share, if asked for) and ``examples`` over all sources, and where there are
        several, ``NAME_loss`` and so on of each; the same on every rank.

        Raises:
            RankFailedError: a rank failed; on all ranks.
        """
        was_training = model.training
        model.eval()
        failure, local = None, {}
        try:
            local = self._local_sums(model)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            model.train(was_training)
        self.agreement.raise_together(failure, "evaluation")
        ranks = self.agreement.gather(local)
        sums = {name: [sum(v) for v in zip(*(rank[name] for rank in ranks), strict=True)] for name in self.sources}
        result = self._means([sum(values) for values in zip(*sums.values(), strict=True)])
        if len(self.sources) > 1:
            for name, values in sums.items():
                result |= {f"{name}_{key}": value for key, value in self._means(values).items()}
        return result

    def _means(self, sums: Sequence[float]) -> dict[str, float]:
        loss, tokens, matches, examples = sums
        exact_match = {"exact_match": matches / examples} if self.exact_match else {}
        return {"loss": loss / tokens, "examples": examples, **exact_match}

    def _local_sums(self, model: DynamicLoraModel) -> dict[str, tuple[float, int, int, int]]:
        """Of this rank's share of every source: sum of the losses, answer tokens, exact matches, examples."""
        shares = {
            name: range(self.agreement.rank, len(examples), self.agreement.size)
            for name, examples in self.sources.items()
        }
        progress = tqdm(
            total=sum(map(len, shares.values())),
            desc="evaluating",
            unit="example",
            leave=False,
            disable=None if self.agreement.rank == 0 else True,
        )
        with progress:
            return {name: self._sums(model, self.sources[name], share, progress) for name, share in shares.items()}

    def _sums(
        self, model: DynamicLoraModel, examples: Dataset, share: range, progress: tqdm
    ) -> tuple[float, int, int, int]:
        loss, tokens, matches = 0.0, 0, 0
        collate = PaddedCollator(self.tokenizer)
        for indices in _chunks(share, self.batch_size):
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
        return loss, tokens, matches, len(share)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
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
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


@torch.no_grad()
def check_packing(model: PreTrainedModel, collate: Collator) -> None:
    """Prove on the model itself that examples of one row do not see each other.

    The second of two examples is computed alone, packed behind the first, and behind the first in one text; packing
    must leave next to nothing of the difference that the text before makes.

    Args:
        model: causal language model, on its device.
        collate: makes the packed batch.

    Raises:
        ValueError: they do see each other, so that the model would learn from other examples' texts.
    """
    was_training = model.training
    model.eval()
    size = model.get_input_embeddings().weight.shape[0]
    first, second = ([(7 * n + shift) % size for n in range(6)] for shift in (3, 5))

    def end(batch: Mapping[str, Tensor | int]) -> Tensor:
        moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        return model(**moved).logits[0, -len(second) :].float()

    def example(ids: list[int]) -> dict[str, list[int]]:
        return {"input_ids": ids, "labels": ids}

    alone = end(collate([[example(second)]]))
    packed = end(collate([[example(first), example(second)]]))
    together = end(collate([[example(first + second)]]))
    model.train(was_training)
    leak, whole = float((packed - alone).norm()), float((together - alone).norm())
    if leak > LEAST_SEPARATION * whole:
        raise ValueError(
            f"data.batching is packed, but in {type(model).__name__} with attention "
            f"{model.config._attn_implementation} the examples of a row see each other (their logits change by "
            f"{leak:.3g}, {leak / whole:.0%} of what one text would do): set data.batching to by_length"
        )


def _chunks(indices: range, size: int) -> Iterator[range]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
