"""Runs that must agree: the same losses, gradient norms and masks, step by step."""

import pytest
from support.forked_run import run_to_the_end
from support.same_run import assert_same_course, evaluation_of

VARIANTS = {
    "one rank": (("--training.per_device_train_batch_size", "8"), 1, "zero2"),
    "one rank, accumulating 4 x 2": (
        ("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "4"),
        1,
        "none",
    ),
    "two ranks, accumulating 2 x 2, with data workers": (
        (
            *("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "2"),
            *("--training.dataloader_num_workers", "1"),
        ),
        2,
        "zero2",
    ),
    "ddp": ((), 2, "ddp"),
    "without fused operations": (("--model.fuse", "false"), 2, "zero2"),
    "gradient checkpointing": (("--training.gradient_checkpointing", "true"), 2, "zero2"),
}


IN_FAST_LANE = ("one rank, accumulating 4 x 2", "ddp", "gradient checkpointing")


@pytest.mark.parametrize(
    "variant",
    [v if v in IN_FAST_LANE else pytest.param(v, marks=pytest.mark.full("ranks")) for v in VARIANTS],
)
def test_the_trajectory_does_not_depend_on_how_it_is_computed(variant, plain_reference, tmp_path):
    overrides, ranks, engine = VARIANTS[variant]
    run = tmp_path / "run"
    run_to_the_end(plain_reference.config, run, tmp_path / "log", *overrides, ranks=ranks, engine=engine)
    assert_same_course(plain_reference.run, run)
    assert evaluation_of(run).keys() >= {"eval_loss", "eval_eval_loss", "eval_eval-small_loss"}
