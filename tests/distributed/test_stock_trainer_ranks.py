"""transformers' own Trainer with the callback on two real ranks, on an NF4 base."""

import pytest
import torch
from support import stock_trainer
from support.ranks import run_ranks
from support.same_gradients import assert_same_gradients
from support.tiny_run import save_tiny_model

PRUNING = {**stock_trainer.PRUNING, "importance": "gate_sensitivity", "equilibrium_weight": 5.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("base")))


def train(base, output, ranks, **options):
    outcomes = run_ranks(stock_trainer.train_on_rank, ranks, base, str(output), PRUNING, options, timeout=280)
    assert all(outcome.error is None for outcome in outcomes), [outcome.error for outcome in outcomes]
    return [outcome.value for outcome in outcomes]


def assert_same_on_all_ranks(values):
    for value in values:
        assert sum(value["ranks"].values()) == stock_trainer.TARGET * len(value["ranks"])
        assert value["ranks"] == values[0]["ranks"]
        assert all(tensor.equal(values[0]["state"][name]) for name, tensor in value["state"].items())


def test_two_ranks_hold_the_same_masks_and_take_the_course_of_one_that_accumulates(base, tmp_path):
    values = train(base, tmp_path / "two", 2)
    assert [value["engine"] for value in values] == ["DistributedDataParallel"] * 2
    assert_same_on_all_ranks(values)
    (alone,) = train(base, tmp_path / "one", 1, gradient_accumulation_steps=2)
    # At LoRA's start, b_i = 0, that of a gate is 0, and a_i has the penalty's alone.
    found, expected = (
        {name: gradient for name, gradient in value["gradients"].items() if "lora_gate" not in name}
        for value in (values[0], alone)
    )
    assert_same_gradients(found, expected, 1e-4)
    assert values[0]["ranks"] == alone["ranks"]
    torch.testing.assert_close(values[0]["losses"], alone["losses"], rtol=2e-4, atol=0)


@pytest.mark.full("ranks")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero2", [False, True], ids=["ddp", "zero2"])
def test_a_start_from_data_and_a_resume_end_at_the_same_bits(base, tmp_path, zero2):
    options = {"zero2": zero2, "init": "gradient", "save_strategy": "steps", "save_steps": 3}
    values = train(base, tmp_path, 2, **options)
    assert [value["engine"] for value in values] == ["DeepSpeedEngine" if zero2 else "DistributedDataParallel"] * 2
    assert_same_on_all_ranks(values)
    resumed = train(base, tmp_path, 2, **options, resume=str(tmp_path / "checkpoint-3"))
    for before, after in zip(values, resumed, strict=True):
        assert after["events"] == [4]
        assert all(after["state"][name].equal(tensor) for name, tensor in before["state"].items())


@pytest.mark.full("ranks")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero2_takes_the_course_of_ddp(base, tmp_path, accumulation):
    """ZeRO-2 shows no gradients, but what they make of the weights: with another penalty the course is another."""
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0}
    ddp, zero2 = (train(base, tmp_path, 2, zero2=zero2, **settings)[0] for zero2 in (False, True))
    assert zero2["engine"] == "DeepSpeedEngine"
    assert ddp["ranks"] == zero2["ranks"]
    for key in ("losses", "norms"):
        torch.testing.assert_close(zero2[key], ddp[key], rtol=2e-3, atol=0)
