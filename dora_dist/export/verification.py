"""Proof by logits that an exported model computes what was trained.

All comparisons are in float32, on token sequences that are made from the vocabulary. The reference is the base that
the adapter was trained on, with the adapter of the run in stock PEFT.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.base_model.shape import input_embedding, positions_of
from dora_dist.console.errors import ExpectedRunError

NUM_SEQUENCES = 4
SEQUENCE_LENGTH = 32

FLOAT32_TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, that float32 rounding may make. On a model of two blocks with
random adapters of rank 1 to 6 it made 1e-6, and leaving out one module of 13 made 0.7."""
EFFECT_SHARE = 0.05
"""Largest share of the adapter's effect that may be off, so that an adapter of little effect cannot hide in the
tolerance above."""
ROUNDED_EFFECT_SHARE = 0.5
"""The same where weights have been rounded to 16 bits, which a weak adapter may not survive."""


@dataclass(frozen=True)
class LogitDifference:
    """How far logits are from the reference.

    Attributes:
        largest: largest absolute difference.
        of_largest_logit: the same, over the largest absolute logit of the reference.
        of_effect: root mean square of the difference, over that of what the adapter does to the base's logits.
    """

    largest: float
    of_largest_logit: float
    of_effect: float

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2e}, {self.of_largest_logit:.1e} of the largest logit, "
            f"{self.of_effect:.1e} of the adapter's effect"
        )


@dataclass(frozen=True)
class Reference:
    """Logits that an exported model is compared with.

    Attributes:
        tokens: ids, int64, shape ``(sequences, length)``.
        trained: logits of base and adapter, float32, shape ``(sequences, length, vocabulary)``.
        base: the same of the base alone.
    """

    tokens: Tensor
    trained: Tensor
    base: Tensor

    def difference(self, logits: Tensor, wanted: Tensor | None = None) -> LogitDifference:
        """Distance of ``logits`` from ``wanted``, by default from what was trained."""
        wanted = self.trained if wanted is None else wanted
        apart = logits - wanted
        largest = apart.abs().max().item()
        return LogitDifference(
            largest=largest,
            of_largest_logit=largest / wanted.abs().max().item(),
            of_effect=(apart.square().mean() / (self.trained - self.base).square().mean()).sqrt().item(),
        )

    def check(self, what: str, logits: Tensor, wanted: Tensor | None = None) -> LogitDifference:
        """Check that logits are those wanted, up to rounding in float32.

        Raises:
            ExpectedRunError: they differ by more, or are not finite.
        """
        found = self.difference(logits, wanted)
        if not (found.of_largest_logit <= FLOAT32_TOLERANCE and found.of_effect <= EFFECT_SHARE):
            raise ExpectedRunError(
                f"{what} does not compute what was trained: {found}; allowed are {FLOAT32_TOLERANCE:.0e} and "
                f"{EFFECT_SHARE}. Nothing was written"
            )
        return found

    def check_rounded(self, what: str, logits: Tensor, dtype: str) -> LogitDifference:
        """Check that logits of a model whose weights have been rounded to 16 bits keep the adapter's effect.

        Raises:
            ExpectedRunError: rounding undoes too much of it, or the logits are not finite.
        """
        found = self.difference(logits)
        if not found.of_effect <= ROUNDED_EFFECT_SHARE:
            raise ExpectedRunError(
                f"{what}: rounding the weights to {dtype} changes the logits too much beside what the adapter does: "
                f"{found}; allowed are {ROUNDED_EFFECT_SHARE} of the effect. Nothing was written; take --dtype "
                "float32, or a format that leaves the adapter apart"
            )
        return found


def probe_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """The same token sequences for the same vocabulary, special tokens left out, shape ``(sequences, length)``."""
    size = min(len(tokenizer), input_embedding(model).num_embeddings)
    ordinary = torch.tensor(sorted(set(range(size)) - set(tokenizer.all_special_ids)))
    length = min(SEQUENCE_LENGTH, positions_of(model.config) or SEQUENCE_LENGTH)
    chosen = torch.randint(len(ordinary), (NUM_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    return ordinary[chosen]


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits in float32 on the CPU, shape ``(sequences, length, vocabulary)``; leaves the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    ids = tokens.to(device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float().cpu()


def make_reference(base: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> Reference:
    """Logits of a base with an adapter folder in stock PEFT, and without. The base is changed in place.

    Raises:
        ExpectedRunError: the adapter changes nothing.
    """
    tokens = probe_tokens(tokenizer, base)
    model = PeftModel.from_pretrained(base, str(adapter))
    trained = logits_of(model, tokens)
    with model.disable_adapter():
        alone = logits_of(model, tokens)
    if torch.equal(trained, alone):
        raise ExpectedRunError(f"the adapter in {adapter} changes no logit of its base: there is nothing to export")
    return Reference(tokens, trained, alone)
