"""Whether the base of a run can be sharded, before any weight is read."""

from packaging.version import Version
from transformers import PreTrainedModel

from dora_dist.base_model.recomputation import recomputable_layers
from dora_dist.config.run import RunConfig

NEEDED_TORCH = "2.12"
"""Before it, a parameter of 4-bit codes (uint8) that is gathered from shards would be made to require a gradient."""


def check_sharding(config: RunConfig, skeleton: PreTrainedModel, torch_version: str) -> None:
    """Refuse ``distributed.shard_base`` where it cannot work; what the configuration alone tells is refused there.

    Args:
        config: of the run.
        skeleton: the model without weights.
        torch_version: of torch, as ``torch.__version__``.

    Raises:
        ValueError: torch is too old, or the model has no layers that could be gathered one by one.
    """
    over = config.distributed.shard_base
    if not over:
        return
    given = f"distributed.shard_base is {str(over).lower()}"
    if Version(torch_version) < Version(NEEDED_TORCH):
        raise ValueError(
            f"{given}, which needs torch {NEEDED_TORCH} or newer, but this is torch {torch_version}: update torch, or "
            "set it to false"
        )
    if not recomputable_layers(skeleton):
        raise ValueError(
            f"{given}, but {config.model.path} has no layers that can be gathered one by one (none is a "
            "GradientCheckpointingLayer of transformers): set it to false"
        )
