"""The order of training data: a function of seed and position only."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class TrainingOrder(Sampler[int]):
    """One permutation after the other, cut off after ``num_samples``.

    There is no epoch boundary: a global batch may hold the end of one permutation and the start of the next, so that
    every optimizer step sees a full batch and the order is the same however a global batch is split over ranks and
    gradient accumulation.

    Args:
        num_examples: size of the data set.
        num_samples: length of the whole run in examples: optimizer steps times global batch.
        seed: of the permutations.
    """

    def __init__(self, num_examples: int, num_samples: int, seed: int) -> None:
        self.num_examples = num_examples
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.num_samples, self.num_examples):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + start // self.num_examples)
            permutation = torch.randperm(self.num_examples, generator=generator)
            yield from permutation[: self.num_samples - start].tolist()
