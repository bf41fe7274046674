"""A frozen base of which every rank holds a shard: torch's FSDP2 on whole layers, and on nothing that is trained.

A layer's weights are gathered from the ranks for its forward, freed, and gathered again for its backward. Trained
parameters are added to the model afterwards, so that FSDP does not know about them, and DDP averages their gradients as
always. Norms, biases, the embedding, the head and the constants of quantization stay whole on every rank.

A gather is a collective: all ranks must run the same layers in the same order. In a training step they do. For work on
a rank's own share of rows, see :meth:`ShardedBase.uneven` and ``Agreement.runs_more``.
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
"""Value of ``distributed.shard_base`` for which every node holds a whole base, sharded over its ranks."""
NOTHING = -1
"""Number that a rank exchanges when it needs no layer."""


class ShardedBase:
    """The shards that this rank holds, and their gathers.

    Args:
        agreement: collectives over all ranks of the run.
        over: True if all ranks share a base, :data:`NODE` if those of each node do.
        timeout_minutes: longest time that a rank waits for the others in a gather.

    Attributes:
        ranks: number of ranks that share a base.

    Raises:
        ExpectedRunError: the ranks of each node are to share a base, but the nodes have different numbers of ranks, or
            those of a node do not follow each other.
    """

    def __init__(self, agreement: "Agreement", over: bool | str, timeout_minutes: float) -> None:
        self._agreement = agreement
        self.ranks = agreement.size if over is True else self._ranks_of_a_node()
        # Separate groups: other exchanges must not get mixed up with the gathers of a rank that has failed.
        timeout = timedelta(minutes=timeout_minutes)
        starts = range(0, agreement.size, self.ranks)
        groups = [dist.new_group(list(range(start, start + self.ranks)), timeout) for start in starts]
        self._mesh = DeviceMesh.from_group(groups[agreement.rank // self.ranks], agreement.device.type)
        self._layers: list[FSDPModule] = []
        self._uneven = False

    def _ranks_of_a_node(self) -> int:
        """Number of ranks on a node, by the launcher's variables. They must follow each other, and be as many on every
        node."""
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
        """Reduce the matrices of a frozen layer to this rank's shard, in place."""
        whole = {one for one in layer.parameters() if one.ndim < 2}
        fully_shard(layer, mesh=self._mesh, reshard_after_forward=True, ignored_params=whole)
        sharded = cast(FSDPModule, layer)
        layer.register_forward_pre_hook(partial(self._before_forward, len(self._layers)), prepend=True)
        self._layers.append(sharded)

    def complete(self, model: nn.Module) -> None:
        """Must be called when all layers of the model have been taken. FSDP then gathers them one after another, and in
        backwards ahead of time."""
        fully_shard(model, mesh=self._mesh, ignored_params=set(model.parameters()))
        # If this is set, transformers (5.23) generates in step with all ranks by its own collectives; here the gathers
        # do that (see uneven). torch sets it only for its compiler.
        vars(model)["_is_fsdp_managed_module"] = False

    def wrap(self, model: nn.Module, accelerator: Any) -> nn.Module:
        """Wrap a model in DDP, for its trained parameters.

        accelerate (1.15) refuses DDP for a model with sharded parameters, and has DDP broadcast all frozen ones.

        Args:
            model: the model, not wrapped yet.
            accelerator: accelerate's accelerator, which does the rest of the preparation.
        """
        model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
        ddp = nn.parallel.DistributedDataParallel
        ddp._set_params_and_buffers_to_ignore_for_model(model, frozen)
        device = self._agreement.device
        return ddp(model, [device] if device.type == "cuda" else None, **accelerator.ddp_handler.to_kwargs())

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """A context in which a module of a layer has its whole weight. All ranks must ask for the same module."""
        (layer,) = [one for one in self._layers if module in set(cast(nn.Module, one).modules())]
        layer.unshard()
        try:
            yield
        finally:
            layer.reshard()

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """A context in which each rank may run the model without gradients any number of times. A rank that needs a
        layer tells all others, and all gather it. At the end, also after an error, this rank takes part in the gathers
        of the others until all ranks are at the end."""
        self._uneven = True
        try:
            yield
        finally:
            self._uneven = False
            for layer in self._layers:  # after a forward that has failed
                layer.reshard()
            while self._gather_for(NOTHING):
                pass

    def _before_forward(self, number: int, *_: Any) -> None:
        if self._uneven and not torch.is_grad_enabled():
            self._gather_for(number)

    def _gather_for(self, needed: int) -> bool:
        """Gather every layer that any rank needs, and keep the one that this rank needs. Returns whether any is."""
        wanted = sorted(set(self._agreement.gather_numbers(needed)) - {NOTHING})
        for number in wanted:
            self._layers[number].unshard()
            if number != needed:
                self._layers[number].reshard()
        return bool(wanted)
