"""Held-out loss and exact match, the same numbers on any number of ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.adapter.model import DynamicLoraForCausalLM, DynamicLoraModel
from dora_dist.data.batches import Collator, PaddedCollator, as_example
from dora_dist.data.encoding.encoder import IGNORED, prompt_length
from dora_dist.distributed.agreement import Agreement

Part = TypeVar("Part")
LEAST_SEPARATION = 0.05
"""How much of what another example changes in an unseparated row may be left in a packed one."""


@dataclass(frozen=True, kw_only=True)
class Evaluator(ABC, Generic[Part]):
    """Measures a model on held-out examples, each rank on its share.

    A subclass says what a rank finds out about its share (a part), how parts are joined, and what figures they give.

    Args:
        sources: held-out examples by the name of their source.
        agreement: collectives over the ranks.
        batch_size: examples at a time on a rank.
    """

    sources: Mapping[str, Dataset]
    agreement: Agreement
    batch_size: int

    @torch.no_grad()
    def __call__(self, model: DynamicLoraModel) -> dict[str, float]:
        """``loss``, ``examples`` and what else is measured over all sources, and where there are several,
        ``NAME_loss`` and so on of each; the same on every rank.

        Raises:
            RankFailedError: a rank failed; on all ranks.
        """
        was_training = model.training
        model.eval()
        failure, local = None, {}
        try:
            local = self._local_parts(model)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            model.train(was_training)
        self.agreement.raise_together(failure, "evaluation")
        ranks = self.agreement.gather(local)
        parts = {name: self.join([rank[name] for rank in ranks]) for name in self.sources}
        result = self.figures(self.join(list(parts.values())))
        if len(self.sources) > 1:
            for name, part in parts.items():
                result |= {f"{name}_{key}": value for key, value in self.figures(part).items()}
        return result

    def _local_parts(self, model: DynamicLoraModel) -> dict[str, Part]:
        shares = {name: self.share(examples) for name, examples in self.sources.items()}
        progress = tqdm(
            total=sum(len(indices) for share in shares.values() for indices in share),
            desc="evaluating",
            unit="example",
            leave=False,
            disable=None if self.agreement.rank == 0 else True,
        )
        with progress:
            return {name: self.measure(model, self.sources[name], share, progress) for name, share in shares.items()}

    @abstractmethod
    def share(self, examples: Dataset) -> list[range]:
        """Batches of this rank, as indices of the examples of a source."""

    @abstractmethod
    def measure(self, model: Any, examples: Dataset, share: list[range], progress: tqdm) -> Part:
        """What this rank finds out about its share of one source."""

    @abstractmethod
    def join(self, parts: Sequence[Part]) -> Part:
        """Parts of several ranks or sources as one."""

    @abstractmethod
    def figures(self, part: Part) -> dict[str, float]:
        """``loss``, ``examples`` and the rest of what a part says."""


@dataclass(frozen=True, kw_only=True)
class OutcomeEvaluator(Evaluator[list[Any]]):
    """Keeps an outcome of every example: a tuple that begins with its index.

    Batches are whole ones of the source, shared out among the ranks, so that what is padded with what does not depend
    on their number.
    """

    def share(self, examples: Dataset) -> list[range]:
        return list(chunks(range(len(examples)), self.batch_size))[self.agreement.rank :: self.agreement.size]

    def join(self, parts: Sequence[list[Any]]) -> list[Any]:
        # In an order that does not depend on the number of ranks, as the sums of floating-point numbers do.
        return sorted((outcome for part in parts for outcome in part), key=lambda outcome: outcome[:3])


AnswerSums = tuple[float, int, int, int]
"""Sum of the losses, answer tokens, exact matches, examples."""


@dataclass(frozen=True, kw_only=True)
class AnswerEvaluator(Evaluator[AnswerSums]):
    """Of a causal language model.

    The loss is the mean over all answer tokens of the data (not a mean of means), so that it depends neither on batch
    size nor on world size. Exact match compares greedily generated answers with the reference, white space stripped.

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


def chunks(indices: range, size: int) -> Iterator[range]:
    """Indices in parts of ``size``, the last one perhaps smaller."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
