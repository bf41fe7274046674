"""Public: the code is in :mod:`dora_dist.method.schedule`."""

from dora_dist.method.schedule import (
    BudgetSchedule,
    FixedRanks,
    GrowthSchedule,
    OneEvent,
    Schedule,
    automatic_interval,
    twentieth_of_phase,
)

__all__ = [
    "BudgetSchedule",
    "FixedRanks",
    "GrowthSchedule",
    "OneEvent",
    "Schedule",
    "automatic_interval",
    "twentieth_of_phase",
]
