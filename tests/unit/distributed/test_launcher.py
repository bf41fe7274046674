"""Launches that cannot become the engine asked for are refused from the environment alone."""

import json
import re

import pytest

from dora_dist.distributed.launcher import (
    check_launch,
    check_precision,
    check_world_size,
    launched,
    with_deepspeed,
    world_size_of,
)

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


@pytest.mark.parametrize("engine", ["zero2", "ddp", "none"])
def test_half_a_launch_is_refused_with_what_is_missing(engine):
    """accelerate would take each process for a world of its own."""
    with pytest.raises(ValueError, match="RANK is 1 and WORLD_SIZE is 2, but LOCAL_RANK is not set"):
        check_launch(engine, {"RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"})


def deepspeed_file(folder, content):
    path = folder / "engine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


@pytest.mark.parametrize("stage", [2, "auto"])
def test_a_deepspeed_file_of_stage_2_passes(tmp_path, stage):
    """Whatever stage the launcher was given: accelerate takes that of the file."""
    environment = deepspeed_file(tmp_path, {"zero_optimization": {"stage": stage}})
    check_launch("zero2", environment)
    if stage == 2:
        check_launch("zero2", {**environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage in {path} is 3, and only stage 2"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage in {path} is 1, and only stage 2"),
        ({"zero_optimization": {}}, "zero_optimization.stage in {path} is missing, and only stage 2"),
        ({"bf16": {"enabled": "auto"}}, "zero_optimization.stage in {path} is missing, and only stage 2"),
        ([2], "zero_optimization.stage in {path} is missing, and only stage 2"),
        ("{stage: 2", "the DeepSpeed file {path} (deepspeed_config_file of the launch file) cannot be read"),
    ],
)
def test_a_deepspeed_file_of_another_stage_is_refused_with_file_and_stage(tmp_path, content, message):
    environment = deepspeed_file(tmp_path, content)
    with pytest.raises(ValueError, match="start it with: ") as caught:
        check_launch("zero2", {**environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    assert message.replace("{path}", str(tmp_path / "engine.json")) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "the launcher's zero_stage is 3, and only stage 2 is supported"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"}, "the DeepSpeed file no/such.json"),
    ],
)
def test_a_stage_of_the_launcher_and_a_file_that_is_not_there_are_refused(changes, message):
    with pytest.raises(ValueError, match="start it with: ") as caught:
        check_launch("zero2", {**DEEPSPEED, **changes})
    assert message in str(caught.value)


TORCHRUN = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID"
DEEPSPEEDS_OWN = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK MASTER_ADDR MASTER_PORT"
RANK_SH = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_PROCID SLURM_LOCALID SLURM_NTASKS"
ACCELERATE = "ACCELERATE_USE_CPU ACCELERATE_MIXED_PRECISION OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("names", "is_rank"),
    [
        (TORCHRUN, True),
        (f"{TORCHRUN} {ACCELERATE} ACCELERATE_USE_DEEPSPEED", True),
        (DEEPSPEEDS_OWN, True),
        (RANK_SH, True),
        (ACCELERATE, False),
        ("SLURM_PROCID SLURM_LOCALID SLURM_NTASKS", False),
        ("WORLD_SIZE", False),
        ("RANK WORLD_SIZE MASTER_ADDR MASTER_PORT", False),
        ("", False),
    ],
    ids=["torchrun", "accelerate", "deepspeed", "rank.sh", "accelerate of one", "srun", "estimate", "container", ""],
)
def test_a_rank_is_what_a_launcher_has_numbered_on_its_machine(names, is_rank):
    assert launched(dict.fromkeys(names.split(), "1")) == is_rank


@pytest.mark.parametrize(("value", "found"), [("true", True), ("True", True), ("false", False), ("1", False)])
def test_deepspeed_is_read_as_accelerate_reads_it(value, found):
    assert with_deepspeed({"ACCELERATE_USE_DEEPSPEED": value}) == found
    assert not with_deepspeed({})


@pytest.mark.parametrize("offload", [{}, None, {"device": "none"}, {"device": "auto"}])
@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_a_deepspeed_file_that_offloads_nothing_passes(tmp_path, name, offload):
    environment = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 2, name: offload}})
    check_launch("zero2", environment)
    check_launch("zero2", {**environment, f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE": "none"})


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_offloading_is_refused_wherever_it_was_set(tmp_path, name):
    """The optimizer's state would be on another device than what an event writes into it."""
    variable = f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE"
    settings = {"zero_optimization": {"stage": 2, name: {"device": "cpu", "pin_memory": True}}}
    of_file = f"zero_optimization.{name}.device in {tmp_path}/engine.json is cpu, and events write"
    with pytest.raises(ValueError, match=f"{re.escape(of_file)}.*leave it out.*start it with: "):
        check_launch("zero2", deepspeed_file(tmp_path, settings))
    with pytest.raises(ValueError, match=f"the launcher's {name}_device is nvme"):
        check_launch("zero2", {**DEEPSPEED, variable: "nvme"})
    automatic = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 2, name: {"device": "auto"}}})
    with pytest.raises(ValueError, match=rf"zero_optimization.{name}.device in \S+ is cpu"):
        check_launch("zero2", {**automatic, variable: "cpu"})


@pytest.mark.parametrize("name", ["cpu_offload", "cpu_offload_param"])
def test_offloading_by_the_name_of_old_is_refused(tmp_path, name):
    """DeepSpeed 0.19 still obeys it."""
    check_launch("zero2", deepspeed_file(tmp_path, {"zero_optimization": {"stage": 2, name: False}}))
    environment = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 2, name: True}})
    with pytest.raises(
        ValueError, match=rf"zero_optimization.{name} in \S+ is True, .*: leave it out.*start it with: "
    ):
        check_launch("zero2", environment)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("optimizer", "training.optim, .*lora_plus_ratio"),
        ("scheduler", "training.lr_scheduler_type and .*"),
        ("torch_autocast", "model.compute_dtype"),
    ],
)
@pytest.mark.parametrize("content", [{"type": "AdamW", "params": {"lr": "auto"}}, {}])
def test_a_deepspeed_file_that_replaces_what_the_configuration_says_is_refused(tmp_path, section, keys, content):
    """transformers leaves optimizer and schedule to DeepSpeed wherever the section is there, even an empty one."""
    environment = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 2}, section: content})
    message = rf"{tmp_path}/engine.json has a section {section}, .*: leave it out, and set {keys}"
    with pytest.raises(ValueError, match=f"{message}.*start it with: "):
        check_launch("zero2", environment)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "no"), ("float32", "NO"), ("bfloat16", "no"), ("bfloat16", "bf16")]
)
def test_a_precision_of_the_launcher_that_the_run_has_passes(dtype, precision):
    check_precision(dtype, {})
    check_precision(dtype, {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_DYNAMO_BACKEND": "NO"})


@pytest.mark.parametrize(
    ("dtype", "variables", "message"),
    [
        ("float32", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "is bf16 .* in float32: set mixed_precision to no"),
        ("float32", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "is fp16 .* in float32: set mixed_precision to no"),
        ("bfloat16", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "is fp16 .* the run computes in bfloat16"),
        ("bfloat16", {"ACCELERATE_MIXED_PRECISION": "fp8"}, "is fp8 .* the run computes in bfloat16"),
        ("bfloat16", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "is inductor .* set dynamo_backend to no"),
    ],
)
def test_a_precision_and_a_compiler_that_only_the_launcher_has_are_refused(dtype, variables, message):
    with pytest.raises(ValueError, match=f"{next(iter(variables))} {message}"):
        check_precision(dtype, variables)


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
