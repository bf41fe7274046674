"""Writing through ZeRO's master copy."""

import torch
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment
from torch import nn

from dora_dist.distributed.engine import engine_of, zero_entries


def test_zeroing_entries_of_a_bfloat16_parameter_leaves_the_rest_of_the_master_copy_alone():
    """A rank that owns entries 2 to 5 of 8; live values are rounded, the master copy is not."""
    exact = torch.linspace(0.991, 1.009, 8)
    parameter = nn.Parameter(exact.bfloat16())
    master = exact[2:6].clone()
    parameter._hp_mapping = tensor_fragment(
        lp_fragment=parameter.data[2:6],
        lp_fragment_address=fragment_address(numel=4, start=2),
        hp_fragment=master,
        hp_fragment_address=fragment_address(numel=4, start=0),
        gradient_dict={},
        offload_gradient_dict={},
        use_offload=False,
        param_group_index=0,
    )
    keep = torch.tensor([True, False, True, False, True, True, False, True])
    zero_entries(parameter, keep)
    assert torch.equal(parameter.detach(), torch.where(keep, exact.bfloat16(), 0))
    assert torch.equal(master, torch.where(keep[2:6], exact[2:6], 0))


def test_a_rank_that_owns_nothing_of_a_parameter_changes_the_live_values_only():
    parameter = nn.Parameter(torch.ones(3))
    parameter._hp_mapping = None
    zero_entries(parameter, torch.tensor([True, False, True]))
    assert parameter.tolist() == [1, 0, 1]


def test_a_model_that_the_trainer_spread_over_gpus_is_not_taken_for_a_plain_one():
    model = nn.Linear(2, 2)
    assert engine_of(model) == "none"
    assert engine_of(nn.DataParallel(model)) == "dp"
