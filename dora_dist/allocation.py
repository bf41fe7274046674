"""Public: the code is in :mod:`dora_dist.method.allocation`."""

from dora_dist.method.allocation import select_components, select_within_budget

__all__ = ["select_components", "select_within_budget"]
