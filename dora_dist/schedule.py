"""Public: the code is in :mod:`dora_dist.method.schedule`."""

from dora_dist.method.schedule import BudgetSchedule

__all__ = ["BudgetSchedule"]
