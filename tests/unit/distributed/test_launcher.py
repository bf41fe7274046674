"""Launches that cannot become the engine asked for are refused from the environment alone."""

import pytest

from dora_dist.distributed.launcher import check_launch, check_world_size, world_size_of

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
DDP_CPU = {"ACCELERATE_USE_CPU": "true", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("engine", "environment"),
    [("zero2", DEEPSPEED), ("zero2", {**DEEPSPEED, "WORLD_SIZE": "1"}), ("ddp", DDP_CPU), ("none", {})],
)
def test_the_right_launch_passes(engine, environment):
    check_launch(engine, environment)


@pytest.mark.parametrize(
    ("engine", "environment", "message"),
    [
        ("zero2", {**DEEPSPEED, "ACCELERATE_USE_CPU": "1"}, "ACCELERATE_USE_CPU is set"),
        ("zero2", {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "was not launched with DeepSpeed"),
        ("zero2", {}, "was not launched with DeepSpeed"),
        ("ddp", DEEPSPEED, "distributed.engine is ddp, but this process was launched with DeepSpeed"),
        ("none", DEEPSPEED, "distributed.engine is none, but this process was launched with DeepSpeed"),
        ("none", {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "2 processes were launched"),
        ("ddp", {}, "no launcher started this process"),
    ],
)
def test_a_wrong_launch_is_refused_with_the_right_command(engine, environment, message):
    with pytest.raises(ValueError, match="start it with: ") as caught:
        check_launch(engine, environment)
    assert message in str(caught.value)


def test_the_world_size_is_the_launchers_or_one():
    assert world_size_of({"WORLD_SIZE": "2"}) == 2
    assert world_size_of({}) == 1


@pytest.mark.parametrize(("world_size", "engine"), [(1, "none"), (8, "zero2"), (2, "ddp")])
def test_a_world_size_that_the_engine_can_have_passes(world_size, engine):
    check_world_size(world_size, engine)


@pytest.mark.parametrize(
    ("world_size", "engine", "message"),
    [
        (0, "ddp", "--world-size is 0, but must be at least 1"),
        (2, "none", "--world-size is 2, but distributed.engine is none, .* set distributed.engine to zero2 or ddp"),
    ],
)
def test_a_world_size_that_the_engine_cannot_have_is_refused(world_size, engine, message):
    with pytest.raises(ValueError, match=message):
        check_world_size(world_size, engine)
