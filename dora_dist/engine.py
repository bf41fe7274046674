"""The optimizer engine around the model: the only file that knows DeepSpeed's insides."""

import torch
from torch import Tensor, nn


def engine_of(wrapped: nn.Module) -> str:
    """Which engine wraps a prepared model: ``zero2``, another ``zeroN``, ``ddp``, ``dp`` (the Trainer's choice for one
    process that sees several GPUs) or ``none``."""
    if isinstance(wrapped, nn.DataParallel):
        return "dp"
    if type(wrapped).__name__ == "DeepSpeedEngine":
        return f"zero{wrapped.zero_optimization_stage()}"
    return "ddp" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else "none"


@torch.no_grad()
def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter for good, also under ZeRO.

    ZeRO keeps a float32 master copy from which every optimizer step overwrites the live parameter: a change in place is
    undone by the next step. Writing the master alone changes the live parameter only then. So both are set; each rank
    writes the part of the master copy that it owns.

    Args:
        parameter: any shape.
        value: same shape, any floating dtype.
    """
    parameter.data.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(device=parameter.device, dtype=torch.float32))


@torch.no_grad()
def read_master(parameter: nn.Parameter) -> Tensor:
    """What the optimizer will step from: ZeRO's float32 master copy where there is one, otherwise the parameter.

    A collective under ZeRO: every rank must call it.
    """
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach().clone()
