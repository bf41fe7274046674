"""Public: the code is in :mod:`dora_dist.method.schedule`."""

from dora_dist.method.schedule import BudgetSchedule, automatic_interval

__all__ = ["BudgetSchedule", "automatic_interval"]
