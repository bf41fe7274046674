"""Public: the code is in :mod:`dora_dist.method.regularizer`."""

from dora_dist.method.regularizer import equilibrium_penalty

__all__ = ["equilibrium_penalty"]
