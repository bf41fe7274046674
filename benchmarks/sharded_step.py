"""A forward and backward with a base in shards beside a whole one: the same bits? what peak of memory?

    python benchmarks/sharded_step.py BASE [--ranks N]      # by default one for each GPU, or two where there is none

BASE is the folder of a causal language model. Codes in uint8 that torch gathers are what bitsandbytes#1945 is about.
The last line is JSON; the exit status is 1 where a bit differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import spawn

from dora_dist import DynamicLoraConfig, add_dynamic_lora
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.load import BaseModelSpec, load_base_model
from dora_dist.base_model.recomputation import recomputable_layers, recompute_first
from dora_dist.benchmark.peak import PeakMeter
from dora_dist.distributed.sharded_base import ShardedBase
from dora_dist.distributed.world import join_at_file

ROWS, LENGTH = 1, 512


def adapted(spec: BaseModelSpec, device: torch.device, shards: ShardedBase | None) -> DynamicLoraModel:
    """The model with an adapter that has an effect, every layer recomputed."""
    base = load_base_model(spec, device, take_layer=None if shards is None else shards.take_layer)
    if shards is not None:
        shards.complete(base)
    model = add_dynamic_lora(base, DynamicLoraConfig(target_rank=8, dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for layer in model.adapted_layers().values():
        layer.lora_b.data.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.01)
    model.use_loss_without_logits()
    recompute_first(base, len(recomputable_layers(base)))
    return model.train()


def measure(spec: BaseModelSpec, device: torch.device, shards: ShardedBase | None) -> tuple[list[Tensor], int]:
    """Loss and gradients of a batch, on the CPU, and the peak of a second one."""
    meter = PeakMeter(device)
    model = adapted(spec, device, shards)
    rank = torch.distributed.get_rank()
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
    seen: list[Tensor] = []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.compute_dtype is torch.bfloat16):
            loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        seen[:] = [one.detach().cpu() for one in (loss, *gradients)]
        model.zero_grad()

    return seen, meter.of_second(step)


def rank_process(rank: int, size: int, folder: str, base: str) -> None:
    """Measure on one rank: a whole base, then this rank's shard of one."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    agreement = join_at_file(Path(folder) / "meeting", rank, size, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = BaseModelSpec(path=base, compute_dtype=dtype)
    whole, most = measure(spec, device, None)
    shards = agreement.sharded_base = ShardedBase(agreement, True, timeout_minutes=10)
    found, peak = measure(spec, device, shards)
    same = len(whole) == len(found) and all(ours.equal(theirs) for ours, theirs in zip(found, whole, strict=True))
    result: dict[str, Any] = {"what": "sharded base", "ranks": size, "same": all(agreement.gather(same))}
    result |= {"tensors": len(whole), "peak_bytes_whole": most, "peak_bytes_sharded": peak}
    if agreement.is_first:
        (Path(folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
    agreement.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # torch has no types for it.
        arguments = (options.ranks, folder, str(options.base))
        spawn(rank_process, arguments, nprocs=options.ranks)  # type: ignore[no-untyped-call]
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    print(json.dumps(result))
    sys.exit(not result["same"])


if __name__ == "__main__":
    main()
