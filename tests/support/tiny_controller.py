"""A controller of a tiny model, in one process."""

from dora_dist.distributed.agreement import Agreement
from dora_dist.method.budget import Budget
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import DynamicRankController
from support.tiny_models import adapt, shake, tiny_model


def make_controller() -> DynamicRankController:
    """A controller whose layers have random values, before its first event."""
    layers = shake(adapt(tiny_model())).adapted_layers()
    schedule = BudgetSchedule(total_steps=10, num_layers=len(layers), initial_rank=3, target_rank=2, interval=2)
    return DynamicRankController(layers, Budget(schedule, dict.fromkeys(layers, 1)), Agreement())
