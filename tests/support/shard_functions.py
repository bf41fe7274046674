"""What ranks run in the tests of a sharded base."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.load import BaseModelSpec, load_base_model
from dora_dist.base_model.recomputation import recomputable_layers, recompute_first
from dora_dist.config.model import ModelConfig
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.sharded_base import ShardedBase
from dora_dist.setup.build import put_in_kernels
from support import liger_stand_in
from support.tiny_models import adapt, shake, tokens

STEPS = 3


class Accelerator:
    """The part of accelerate's Accelerator that prepares a model, without effect on its base."""

    class ddp_handler:
        @staticmethod
        def to_kwargs() -> dict[str, Any]:
            return {"broadcast_buffers": False}

    @staticmethod
    def prepare_model(model: nn.Module, **_: Any) -> nn.Module:
        return model


def sharded_base(folder: str, quantization: str, over: bool | str, agreement: Agreement, **more: Any) -> Any:
    """The base, of which this rank holds a shard."""
    shards = agreement.sharded_base = ShardedBase(agreement, over, timeout_minutes=1)
    spec = BaseModelSpec(path=folder, quantization=quantization, **more)
    base = load_base_model(spec, take_layer=shards.take_layer)
    shards.complete(base)
    return base


def adapted(base: Any, recomputed: int = 0) -> DynamicLoraModel:
    """The base with an adapter whose components all have an effect, the same on every rank."""
    model = shake(adapt(base))
    model.use_loss_without_logits()
    recompute_first(base, recomputed)
    return model.train()


def held_numel(model: nn.Module) -> tuple[int, int]:
    """Number of elements of the layers' frozen matrices: those that this rank holds, and all."""
    matrices = [one for name, one in model.named_parameters() if ".layers." in name and ".lora_" not in name]
    matrices = [one for one in matrices if one.ndim > 1]
    return sum(one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in matrices), sum(
        one.numel() for one in matrices
    )


def train_both(
    folder: str, quantization: str, recomputed: int, over: bool | str = True, node: int = 0
) -> dict[str, Any]:
    """Train some steps with DDP on a whole base and on a sharded one, from the same start, with other rows on every
    rank.

    Args:
        folder: folder of the base.
        quantization: quantization of the base.
        recomputed: number of layers that are recomputed.
        over: value of ``distributed.shard_base``.
        node: number of ranks of a node, where that counts.
    """
    if node:
        os.environ.update(LOCAL_WORLD_SIZE=str(node), LOCAL_RANK=str(int(os.environ["RANK"]) % node))
    agreement = Agreement()
    whole = adapted(load_base_model(BaseModelSpec(path=folder, quantization=quantization)), recomputed)
    expected = train(nn.parallel.DistributedDataParallel(whole, broadcast_buffers=False), agreement.rank)
    model = adapted(sharded_base(folder, quantization, over, agreement), recomputed)
    before = held_numel(model)
    found = train(agreement.sharded_base.wrap(model, Accelerator), agreement.rank)
    return {"expected": expected, "found": found, "before": before, "after": held_numel(model)}


def train_with_kernels(folder: str) -> dict[str, Any]:
    """Like :func:`train_both`, with the kernels that a run on GPUs would put in where Liger is installed."""
    liger_stand_in.install()
    agreement = Agreement()
    bases = {
        "expected": load_base_model(BaseModelSpec(path=folder)),
        "found": sharded_base(folder, "nf4", True, agreement),
    }
    seen: dict[str, Any] = {}
    for name, base in bases.items():
        shards = agreement.sharded_base if name == "found" else None
        kernels = put_in_kernels(base, ModelConfig(path=folder), torch.device("cuda"), shards)
        model = shake(adapt(base, kernels=kernels)).train()
        ddp = nn.parallel.DistributedDataParallel
        wrapped = ddp(model, broadcast_buffers=False) if shards is None else shards.wrap(model, Accelerator)
        seen[name] = kernels.names, train(wrapped, agreement.rank)
    return seen


def train_summarizers(folder: str) -> dict[str, list[Tensor]]:
    """Like :func:`train_both`, for an unquantized model with encoder and decoder: on a whole base as it is, on one
    whose layers add up the gradients of their inputs each for itself, and on a sharded one."""
    agreement = Agreement()
    seen = {}
    for name in ("whole", "whole, layer by layer"):
        base = load_base_model(BaseModelSpec(path=folder, quantization="none", task="seq2seq"))
        if name != "whole":
            for layer in recomputable_layers(base):
                layer.register_forward_pre_hook(_inputs_of_its_own, with_kwargs=True)
        wrapped = nn.parallel.DistributedDataParallel(shake(adapt(base)).train(), broadcast_buffers=False)
        seen[name] = train(wrapped, agreement.rank)
    model = shake(adapt(sharded_base(folder, "none", True, agreement, task="seq2seq"))).train()
    return {**seen, "shards": train(agreement.sharded_base.wrap(model, Accelerator), agreement.rank)}


def _inputs_of_its_own(_: nn.Module, *given: Any) -> Any:
    """Pass everything that comes into a layer as views, so that autograd adds up what the layer adds to a gradient
    before it adds that to what other layers add. FSDP2 has that effect: it passes a layer's inputs through a function
    of autograd."""
    return tree_map(lambda one: one.view_as(one) if isinstance(one, Tensor) and one.requires_grad else one, given)


def train(wrapped: nn.Module, rank: int) -> list[Tensor]:
    """Return loss and gradients of every step, and the adapter in the end."""
    trained = [one for one in wrapped.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    seen: list[Tensor] = []
    for step in range(STEPS):
        ids = tokens(rows=2, seed=10 * step + rank)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        seen += [loss.detach().clone(), *(one.grad.clone() for one in trained)]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(one.detach().clone() for one in trained)]


@torch.no_grad()
def run_unevenly(folder: str, failing: int | None) -> dict[str, Any]:
    """Each rank runs the model once more than the rank before it; the first one never does. Returns what a rank
    computes, and the same computed with a whole base. One rank fails in the middle of its first forward, and all name
    it."""
    agreement = Agreement()
    whole = adapted(load_base_model(BaseModelSpec(path=folder))).eval()
    model = adapted(sharded_base(folder, "nf4", True, agreement)).eval()
    rows = [tokens(seed=number) for number in range(agreement.rank)]
    found: list[Tensor] = []
    if failing == agreement.rank:
        model.adapted_layers()["model.layers.1.mlp.down_proj"].register_forward_pre_hook(fail)
        model.get_base_model().model.layers[1].mlp.forward = fail
    with agreement.together("running the model"), agreement.uneven_forwards():
        found += [model(input_ids=ids).logits for ids in rows]
    return {"found": found, "expected": [whole(input_ids=ids).logits for ids in rows], "held": held_numel(model)}


def fail(*_: Any) -> None:
    raise RuntimeError("something of this rank's own")


def fail_with_gradients(folder: str, failing: int) -> None:
    """One rank fails where all run the model with gradients."""
    agreement = Agreement()
    model = adapted(sharded_base(folder, "nf4", True, agreement))
    with agreement.together("a pass", runs_model=True):
        if agreement.rank == failing:
            fail()
        if failing >= agreement.size:
            model(input_ids=tokens()).logits.sum().backward()


def weights_one_by_one(folder: str) -> list[bool]:
    """For each layer, whether its weight is the whole base's where all ranks ask for it."""
    from dora_dist.base_model.quantization import dequantized_weight

    agreement = Agreement()
    whole = adapted(load_base_model(BaseModelSpec(path=folder))).adapted_layers()
    model = adapted(sharded_base(folder, "nf4", True, agreement))
    same = []
    for name, layer in model.adapted_layers().items():
        with agreement.whole_weight(layer.base_layer):
            same.append(dequantized_weight(layer.base_layer).equal(dequantized_weight(whole[name].base_layer)))
    return same


def compare_bases(folder: str, odd: str) -> None:
    """Compare the bases of which the ranks hold shards; the last rank has read another base."""
    from dora_dist.base_model.recomputation import Recomputation
    from dora_dist.setup.build import check_same_on_all_ranks
    from support.tiny_run import some_fingerprint

    agreement = Agreement()
    model = adapt(sharded_base(odd if agreement.rank == agreement.size - 1 else folder, "nf4", True, agreement))
    check_same_on_all_ranks(agreement, some_fingerprint(), Recomputation(0, 2), model)


def load_shard_and_watch(tiny: str, folder: str, quantization: str, hoard: bool) -> dict[str, int]:
    """Memory, in bytes, that loading a shard of a base takes on this rank while the others load theirs.

    Args:
        tiny: folder of another base, loaded before, so that what is imported on first use is not counted.
        folder: folder of the base.
        quantization: quantization of the base.
        hoard: whether to hold every layer while the base is loaded, like a loader that shards in the end.
    """
    from process_memory import MemoryWatch

    agreement = Agreement()
    sharded_base(tiny, quantization, True, agreement)
    shards = ShardedBase(agreement, True, timeout_minutes=1)
    held: list[Tensor] = []

    def take(layer: nn.Module) -> None:
        if hoard:
            held.extend(one.data for one in layer.parameters())
        shards.take_layer(layer)

    dist.barrier()
    with MemoryWatch() as watch:
        base = load_base_model(BaseModelSpec(path=folder, quantization=quantization), take_layer=take)
        held.clear()
    return {"resident": watch.resident, "own": watch.anonymous, "kept": watch.kept, **_sizes(base)}


def _sizes(base: nn.Module) -> dict[str, int]:
    """Bytes of a base that a rank holds, and bytes of the base's largest layer when it is whole."""
    local = [one.to_local() if isinstance(one, DTensor) else one for one in (*base.parameters(), *base.buffers())]
    states = [getattr(module, "quant_state", None) for module in base.modules()]
    local += [one for state in states if state is not None for one in (state.absmax, state.state2.absmax)]
    layers = [list(layer.parameters()) for layer in base.model.layers]
    return {
        "shard": sum(one.numel() * one.element_size() for one in local),
        "layer": max(sum(one.numel() * one.element_size() for one in layer) for layer in layers),
    }


def share_out_over_odd_nodes() -> None:
    """Share a base out over two nodes, one with two ranks and one with one."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_WORLD_SIZE="1" if rank == 2 else "2", LOCAL_RANK=str(rank % 2))
    ShardedBase(Agreement(), "node", timeout_minutes=1)
