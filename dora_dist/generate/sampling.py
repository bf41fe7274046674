"""How the next token of an answer is chosen."""

import math
from dataclasses import dataclass
from typing import Any

from dora_dist.config.checks import require
from dora_dist.config.run import LARGEST_SEED

GREEDY = 0.0
"""Temperature that stands for taking the most likely token."""
LEAST_TEMPERATURE = 1e-3
"""Lowest temperature: logits divided by much less are not finite."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, as the options of the command line say.

    Args:
        temperature: divisor of the logits, of which the probabilities are made; 0 takes the most likely token.
        top_p: only the most likely tokens that have this probability together; None for all.
        top_k: only this many of the most likely tokens; None for all.
        seed: seed of the choices; None for 0.

    Raises:
        ValueError: one is not in its range, or means nothing without a temperature.
    """

    temperature: float = GREEDY
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        warm = self.temperature == GREEDY or LEAST_TEMPERATURE <= self.temperature < math.inf
        rule = f"be 0, which takes the most likely token, or at least {LEAST_TEMPERATURE}, and finite"
        require(warm, "--temperature", self.temperature, rule)
        require(self.top_p is None or 0 < self.top_p <= 1, "--top-p", self.top_p, "be above 0, and at most 1")
        require(self.top_k is None or self.top_k >= 1, "--top-k", self.top_k, "be at least 1")
        known = self.seed is None or 0 <= self.seed <= LARGEST_SEED
        require(known, "--seed", self.seed, f"lie between 0 and {LARGEST_SEED}")
        for name, value in (("--top-p", self.top_p), ("--top-k", self.top_k), ("--seed", self.seed)):
            if value is not None and self.temperature == GREEDY:
                raise ValueError(
                    f"{name} is {value}, but without a temperature the most likely token is taken: set "
                    "--temperature, to 1 say, or leave it out"
                )

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``; without ``top_p`` and ``top_k`` nothing is cut off."""
        if self.temperature == GREEDY:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0 if self.top_k is None else self.top_k,
        }

    def begin(self, turn: int) -> None:
        """Seed the choices of a batch, or of a turn of a conversation: base and adapter draw the same numbers."""
        if self.temperature != GREEDY:
            import numpy as np  # not before a model is there to answer
            import torch

            # torch's generator on CPUs takes the low 32 bits of a seed only.
            (state,) = np.random.SeedSequence([self.seed or 0, turn]).generate_state(1)
            torch.manual_seed(int(state))
