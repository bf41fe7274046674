"""What an optimizer counts, when another takes over: where its kernels want it. A ``meta`` device stands for a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import read_counters
from dora_dist.training.optimizer_shards import OptimizerShards, WholeState

STEP = 7


def zero_engine(**options):
    """What of DeepSpeed's engine holds the optimizer of one rank, which has made no step yet."""
    flat = nn.Parameter(torch.zeros(4, device="meta"))
    optimizer = torch.optim.AdamW([flat])
    optimizer.param_groups[0].update(options)
    return SimpleNamespace(
        optimizer=SimpleNamespace(single_partition_of_fp32_groups=[flat], optimizer=optimizer), global_steps=0
    )


def parameter_of_zero():
    address = SimpleNamespace(start=0, numel=4)
    parameter = nn.Parameter(torch.zeros(4, device="meta"))
    parameter._hp_mapping = SimpleNamespace(
        param_group_index=0, lp_fragment_address=address, hp_fragment_address=address
    )
    return parameter


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"fused": None}, {}])
def test_zero_takes_over_the_number_of_steps_to_where_its_optimizer_counts(options):
    """A checkpoint of another engine is read into host memory, whatever the optimizer that wrote it."""
    engine = zero_engine(**options)
    shards = OptimizerShards(engine, {"gate": parameter_of_zero()}, Agreement())
    moments = {name: torch.ones(4) for name in ("exp_avg", "exp_avg_sq")}
    whole = WholeState({"gate": {"step": torch.tensor(float(STEP)), **moments}}, {"gate": torch.ones(4)})
    shards.take_over(whole, STEP)
    (state,) = engine.optimizer.optimizer.state.values()
    assert state["step"].device.type == ("meta" if any(options.values()) else "cpu")
    assert state["step"].dtype == torch.float32
    assert engine.global_steps == STEP


@pytest.mark.parametrize(
    ("saved_on", "group", "device", "dtype"),
    [
        ("cuda", {"fused": None, "capturable": False}, "cpu", torch.float64),
        ("cpu", {"fused": True, "capturable": False}, "meta", torch.float32),
        ("cuda", {}, "meta", torch.float64),
        ("cpu", {}, "cpu", torch.float64),
    ],
)
def test_a_counter_is_where_the_optimizer_that_reads_it_wants_it(saved_on, group, device, dtype):
    """An optimizer that is not torch's counts where it did."""
    counters = {"step": {"value": STEP, "dtype": "float64", "device": saved_on}, "other": {"value": 3}}
    found = read_counters(counters, group, torch.device("meta"))
    assert (found["step"].device.type, found["step"].dtype, found["other"]) == (device, dtype, 3)
    if device == "cpu":
        assert int(found["step"]) == STEP
