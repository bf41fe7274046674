"""Between two events the host does not wait for the GPU: torch turns a wait into an error here."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.commands import run
from support.repository import REPOSITORY
from support.tiny_run import write_config
from support.waitless_rank import waits_are_errors

from dora_dist.benchmark.contestants import Conditions, build
from dora_dist.benchmark.options import DYNAMIC, PRUNED, build_parser, resolve
from dora_dist.benchmark.shapes import parse_shape
from dora_dist.benchmark.synthetic_base import build_base, random_rows
from dora_dist.distributed.agreement import Agreement

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAUNCHERS = {
    "none": (sys.executable,),
    "ddp": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"),
}


@pytest.mark.parametrize("name", [DYNAMIC, PRUNED])
def test_a_step_with_the_method_and_its_update_does_not_wait(name):
    device = torch.device("cuda", 0)
    shape = replace(parse_shape("8b-tiny"), batch=2)
    options = replace(resolve(build_parser().parse_args(["--device", "cuda"])), output=Path())
    base = build_base(shape, device, torch.bfloat16, seed=0)
    conditions = Conditions(base=base, options=options, agreement=Agreement(device), checkpointing=True)
    rows = partial(random_rows, shape, device, 0, 0)
    contestant = build(name, conditions)
    contestant.prepare(rows)
    batches = [rows(number) for number in range(4)]
    for batch in batches[:2]:
        contestant.step(batch)
    with waits_are_errors():
        for batch in batches[2:]:
            contestant.step(batch)


@pytest.mark.parametrize("engine", LAUNCHERS)
def test_an_ordinary_step_of_a_run_does_not_wait(engine, tmp_path):
    quiet = ("--training.logging_steps", "100", "--training.save_steps", "100", "--pruning.interval", "4")
    finished = run(
        *LAUNCHERS[engine],
        *(
            "-m",
            "support.waitless_rank",
            "--config",
            str(write_config(tmp_path)),
            "--distributed.engine",
            engine,
            *quiet,
        ),
        DS_ACCELERATOR="",
        CUDA_VISIBLE_DEVICES="0",
        PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}",
    )
    assert finished.status == 0, finished.output
    assert "watched steps [3, " in finished.output, finished.output


def test_flags_of_ranks_beside_nccl_are_exchanged_in_host_memory(tmp_path):
    from dora_dist.distributed.world import join_at_file

    agreement = join_at_file(tmp_path / "meeting", rank=0, size=1, device=torch.device("cuda", 0))
    try:
        assert agreement.backend == "nccl"
        torch.cuda.set_sync_debug_mode("error")
        assert agreement.any(True)
        assert agreement.gather({"rank": 0}) == [{"rank": 0}]
        torch.cuda.set_sync_debug_mode("default")
        assert agreement.mean(torch.ones(3, dtype=torch.float64, device="cuda")).tolist() == [1, 1, 1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        agreement.close()
