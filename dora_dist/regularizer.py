"""Public: the code is in :mod:`dora_dist.method.regularizer`."""

from dora_dist.method.regularizer import equilibrium_penalty, penalty_of_stacks

__all__ = ["equilibrium_penalty", "penalty_of_stacks"]
