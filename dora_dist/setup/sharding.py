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
        config: the run's configuration.
        skeleton: the model without weights.
        torch_version: version of torch, as ``torch.__version__``.

    Raises:
        ValueError: torch is too old, or the model has no layers that could be gathered one by one.
    """
    if not config.distributed.shard_base:
        return
    check_torch(config, torch_version)
    if not recomputable_layers(skeleton):
        raise ValueError(
            f"{_given(config)}, but {config.model.path} has no layers that can be gathered one by one (none is a "
            "GradientCheckpointingLayer of transformers): set it to false"
        )


def check_torch(config: RunConfig, torch_version: str) -> None:
    """Refuse ``distributed.shard_base`` with a torch that is too old for it.

    Raises:
        ValueError: it is.
    """
    if config.distributed.shard_base and Version(torch_version) < Version(NEEDED_TORCH):
        raise ValueError(
            f"{_given(config)}, which needs torch {NEEDED_TORCH} or newer, but this is torch {torch_version}: update "
            "torch, or set it to false"
        )


def _given(config: RunConfig) -> str:
    return f"distributed.shard_base is {str(config.distributed.shard_base).lower()}"
