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
def zero_entries(parameter: nn.Parameter, keep: Tensor) -> None:
    """Set entries of a parameter to 0 for good, also under ZeRO; leave all others as they are.

    ZeRO keeps a float32 master copy from which every optimizer step overwrites the live parameter: a change in place
    is undone by the next step. Writing the master alone changes the live parameter only then. So both are changed, each
    rank the part of the master copy that it owns. The live values of the other entries, which may have been rounded
    to 16 bits, must not find their way into the master copy.

    Args:
        parameter: any shape.
        keep: boolean, same shape; False where the entry becomes 0.
    """
    parameter.data.masked_fill_(~keep, 0)
    owned = getattr(parameter, "_hp_mapping", None)
    if owned is not None:
        address = owned.lp_fragment_address
        owned.get_hp_fragment().masked_fill_(~keep.flatten().narrow(0, address.start, address.numel), 0)
