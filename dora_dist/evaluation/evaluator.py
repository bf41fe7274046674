"""Held-out figures, the same numbers on any number of ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.out_of_memory import explained

NUM_SHOWN = 4
"""Examples of a source whose generated answers are kept to look at: its first ones."""
MOST_CHARACTERS = 2000
"""Longest text that is kept to look at."""
MEMORY_ADVICE = (
    "in an evaluation: lower training.per_device_eval_batch_size; where it is 1, evaluation.max_new_tokens in a new run"
)


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """What a model has generated for a held-out example. Long texts are cut short, and say so.

    Attributes:
        number: index of the example in its source.
        prompt: what the model was given.
        reference: the answer of the data.
        answer: the model's.
    """

    number: int
    prompt: str
    reference: str
    answer: str

    @classmethod
    def of(cls, number: int, prompt: str, reference: str, answer: str) -> "ShownAnswer":
        return cls(number=number, prompt=_end_of(prompt), reference=_shorter(reference), answer=_shorter(answer))


def _shorter(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]} [... {left_out} more characters]"


def _end_of(prompt: str) -> str:
    """A prompt, cut short at its beginning: the answer follows its end."""
    left_out = len(prompt) - MOST_CHARACTERS
    return prompt if left_out <= 0 else f"[{left_out} more characters ...] {prompt[-MOST_CHARACTERS:]}"


@dataclass(frozen=True, kw_only=True)
class Evaluator(ABC):
    """Measures a model on held-out examples, each rank on its share.

    A subclass says what the outcome of an example or of a batch is, and what figures outcomes give. An outcome is a
    tuple that begins with the index of the example, or of the first one of the batch.

    Args:
        sources: held-out examples by the name of their source.
        agreement: collectives over the ranks.
        batch_size: number of examples at a time on a rank.

    Attributes:
        shown: name of a source -> what the latest evaluation generated for its first :data:`NUM_SHOWN` examples, the
            same on every rank; empty lists for a task that generates nothing.
    """

    sources: Mapping[str, Dataset]
    agreement: Agreement
    batch_size: int
    shown: dict[str, list[ShownAnswer]] = field(default_factory=dict, init=False, compare=False)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """``loss``, ``examples`` and what else is measured over all sources, and where there are several,
        ``NAME_loss`` and so on of each; the same on every rank.

        Raises:
            RankFailedError: a rank failed; on all ranks.
            Exception: this rank's own error, where all ranks failed in the same way.
        """
        was_training = model.training
        model.eval()
        try:
            with (
                self.agreement.together("evaluation"),
                explained(lambda: MEMORY_ADVICE),
                self.agreement.uneven_forwards(),
            ):
                local = self._local_parts(model)
        finally:
            model.train(was_training)
        ranks = self.agreement.gather(local)
        parts = {name: _in_order(rank[name] for rank in ranks) for name in self.sources}
        self.shown.update({name: self.shown_of(part) for name, part in parts.items()})
        result = self.figures(_in_order(parts.values()))
        if len(self.sources) > 1:
            for name, part in parts.items():
                result |= {f"{name}_{key}": value for key, value in self.figures(part).items()}
        return result

    def _local_parts(self, model: nn.Module) -> dict[str, list[Any]]:
        shares = {name: self.share(examples) for name, examples in self.sources.items()}
        progress = tqdm(
            total=sum(len(indices) for share in shares.values() for indices in share),
            desc="evaluating",
            unit="example",
            leave=False,
            disable=None if self.agreement.is_first else True,
        )
        with progress:
            return {name: self.measure(model, self.sources[name], share, progress) for name, share in shares.items()}

    def share(self, examples: Dataset) -> list[range]:
        """Batches of this rank, as indices of the examples of a source. Ranks share out whole batches of the source, so
        that which examples are padded together does not depend on the number of ranks."""
        return list(chunks(range(len(examples)), self.batch_size))[self.agreement.rank :: self.agreement.size]

    @abstractmethod
    def measure(self, model: Any, examples: Dataset, share: list[range], progress: tqdm) -> list[Any]:
        """Outcomes of this rank's share of one source."""

    @abstractmethod
    def figures(self, part: list[Any]) -> dict[str, float]:
        """``loss``, ``examples`` and the other figures of one outcome or more."""

    def shown_of(self, part: list[Any]) -> list[ShownAnswer]:
        """What outcomes have kept to look at, in the order of the examples."""
        return []


def _in_order(parts: Iterable[list[Any]]) -> list[Any]:
    """Outcomes of several ranks or sources, in an order that does not depend on the number of ranks, as the sums of
    floating-point numbers do."""
    return sorted((outcome for part in parts for outcome in part), key=lambda outcome: outcome[:3])


def chunks(indices: range, size: int) -> Iterator[range]:
    """Indices in parts of ``size``, the last one perhaps smaller."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
