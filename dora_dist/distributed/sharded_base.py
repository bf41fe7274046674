"""A frozen base of which every rank holds a shard: torch's FSDP2 on whole layers, and on nothing that is trained.

A layer's weights are gathered from the ranks for its forward, let go, and gathered again for its backward. What is
trained is added to the model afterwards, so that FSDP does not know of it, and DDP averages its gradients as ever.
Norms, biases, the embedding, the head and the constants of quantization stay whole on every rank.

A gather is a collective: all ranks have to run the same layers in the same order. In a training step they do. For what
a rank does on a share of its own, see :meth:`ShardedBase.uneven` and ``Agreement.runs_more``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dora_dist.console.errors import ExpectedRunError

if TYPE_CHECKING:
    from dora_dist.distributed.agreement import Agreement

NODE = "node"
"""Value of ``distributed.shard_base``: every node holds a whole base, in shards over its ranks."""
NOTHING = -1
"""Stands for a layer where a rank needs none."""


class ShardedBase:
    """The shards that this rank holds, and their gathers.

    Args:
        agreement: over all ranks of the run.
        over: whether all ranks share a base (True), or those of each node (:data:`NODE`).
        timeout_minutes: how long a rank waits for the others in a gather.

    Attributes:
        ranks: that share a base.

    Raises:
        ExpectedRunError: a base is to be shared by the ranks of a node, but the nodes differ in their ranks.
    """

    def __init__(self, agreement: "Agreement", over: bool | str, timeout_minutes: float) -> None:
        self._agreement = agreement
        self.ranks = agreement.size if over is True else self._ranks_of_a_node()
        # Groups of their own: what ranks exchange besides must not come between the gathers of a rank that has failed.
        timeout = timedelta(minutes=timeout_minutes)
        starts = range(0, agreement.size, self.ranks)
        groups = [dist.new_group(list(range(start, start + self.ranks)), timeout) for start in starts]
        self._mesh = DeviceMesh.from_group(groups[agreement.rank // self.ranks], agreement.device.type)
        self._layers: list[FSDPModule] = []
        self._uneven = False

    def _ranks_of_a_node(self) -> int:
        """As the launcher says. Those of a node must follow each other, and be as many on every node."""
        here, place = (int(os.environ.get(name, -1)) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
        counts, places = zip(*self._agreement.gather((here, place)), strict=True)
        if len(set(counts)) > 1 or here < 1 or any(place != rank % here for rank, place in enumerate(places)):
            raise ExpectedRunError(
                f"distributed.shard_base is {NODE}, for which every node must have as many ranks, that follow each "
                f"other, but by LOCAL_WORLD_SIZE of all ranks the nodes have {', '.join(map(str, counts))}, and by "
                f"LOCAL_RANK they are number {', '.join(map(str, places))} there (-1 is not set): start them so, or "
                "set it to true"
            )
        return here

    def take_layer(self, layer: nn.Module) -> None:
        """Leave this rank's shard of the matrices of a frozen layer, in place."""
        whole = {one for one in layer.parameters() if one.ndim < 2}
        fully_shard(layer, mesh=self._mesh, reshard_after_forward=True, ignored_params=whole)
        sharded = cast(FSDPModule, layer)
        layer.register_forward_pre_hook(partial(self._before_forward, len(self._layers)), prepend=True)
        self._layers.append(sharded)

    def complete(self, model: nn.Module) -> None:
        """All layers of this model have been taken: from now on they are gathered one after the other, in backwards
        ahead of time."""
        fully_shard(model, mesh=self._mesh, ignored_params=set(model.parameters()))
        # transformers (5.23) generates in step with all ranks where it sees this, by collectives of its own; in step
        # are the gathers here. torch sets it for its compiler only.
        vars(model)["_is_fsdp_managed_module"] = False

    def wrap(self, model: nn.Module, accelerator: Any) -> nn.Module:
        """DDP around a model, for what is trained of it.

        accelerate (1.15) refuses DDP for a model with sharded parameters, and has DDP broadcast all frozen ones.

        Args:
            model: not wrapped yet.
            accelerator: of accelerate, which prepares all but that.
        """
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
        ddp = nn.parallel.DistributedDataParallel
        ddp._set_params_and_buffers_to_ignore_for_model(model, frozen)
        device = self._agreement.device
        return ddp(model, [device] if device.type == "cuda" else None, **accelerator.ddp_handler.to_kwargs())

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """While it lasts, a module of a layer has its whole weight. All ranks ask for the same one."""
        (layer,) = [one for one in self._layers if module in set(cast(nn.Module, one).modules())]
        layer.unshard()
        try:
            yield
        finally:
            layer.reshard()

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """While it lasts, this rank runs the model without gradients as often as it likes, and other ranks as often as
        they like. Whoever needs a layer says so to all, and all gather it. At the end, also by an error, this rank
        takes part in the gathers of the others until all are there."""
        self._uneven = True
        try:
            yield
        finally:
            self._uneven = False
            for layer in self._layers:  # of a forward that has failed
                layer.reshard()
            while self._gather_for(NOTHING):
                pass

    def _before_forward(self, number: int, *_: Any) -> None:
        if self._uneven and not torch.is_grad_enabled():
            self._gather_for(number)

    def _gather_for(self, needed: int) -> bool:
        """Gather every layer that some rank needs, and keep the one that this rank does; whether there was any."""
        wanted = sorted(set(self._agreement.gather_numbers(needed)) - {NOTHING})
        for number in wanted:
            self._layers[number].unshard()
            if number != needed:
                self._layers[number].reshard()
        return bool(wanted)
