"""What breaks on a cluster, broken on purpose: every rank ends in time, says what happened, and the run goes on from
its last complete checkpoint to the result of a run that was left alone. docs/reliability.md has the table.

Two to four real ranks under ZeRO-2 run the entry point's ``main`` (see ``forked_run.py``).
"""

import json
import math
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.faulty_rank import faulty_rank
from support.forked_run import free_port, log_of, run_to_the_end, runs_left_alone, start_run, train_rank
from support.ranks import start_ranks, wait_for_ranks
from support.same_run import assert_same_run
from support.tiny_run import write_config

from dora_dist.console.errors import PREEMPTED
from dora_dist.console.files import read_lines
from dora_dist.runs import checkpoint, records
from dora_dist.runs.summary import report

NODE = platform.node()
FULL = pytest.mark.full("faults")
SMALL = ("--training.per_device_train_batch_size", "2")  # on four ranks, the global batch of two ranks


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("faults"),
        adapter={"dropout": 0.1},
        distributed={"silent_seconds": 5, "max_skipped_steps": 2},
    )


@pytest.fixture(scope="module")
def whole(config):
    return runs_left_alone(config, lambda ranks: ())


def broken_run(config, output, log, faults, *overrides, ranks=2, timeout=60):
    """Exit codes and output of a run with faults."""
    processes = start_run(config, output, log, *overrides, ranks=ranks, target=faulty_rank, more=(faults,))
    stopped = [rank for rank, mine in faults.items() if "stop" in mine]
    for rank, process in enumerate(processes):
        if rank not in stopped:
            process.join(timeout)
    for rank in stopped:
        processes[rank].kill()
    wait_for_ranks(processes, timeout=5)
    return [process.exitcode for process in processes], log_of(log, ranks)


def assert_goes_on(config, output, log, whole, *overrides, ranks=2):
    text = run_to_the_end(config, output, log, *overrides, ranks=ranks)
    assert "resuming from" in text
    assert_same_run(whole(ranks), output)


PLACES = {
    "forward 5": "forward, backward and update of step 5",
    "event 4": "comparing the adapter before the pruning event of step 4",
    "save 5": "writing .*checkpoint-5",
}


@pytest.mark.parametrize(
    ("place", "victim"),
    [
        ("save 5", 1),
        pytest.param("forward 5", 1, marks=FULL),
        pytest.param("event 4", 1, marks=FULL),
        pytest.param("forward 5", 0, marks=FULL),
    ],
)
def test_a_rank_that_is_killed_is_named_on_the_others(place, victim, config, whole, tmp_path):
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", {victim: {"kill": place}})
    survivor = 1 - victim
    assert codes[victim] == -9
    assert codes[survivor] == PREEMPTED, text
    (message,) = [line for line in text.splitlines() if line.startswith(f"[rank {survivor}] error: ")]
    named = (
        f"rank {victim} ({NODE}) is not responding" if victim else "rank 0, or the launcher that keeps the rendezvous"
    )
    assert named in message
    assert re.search(f"this rank was in: {PLACES[place]}", message), message
    assert "Traceback" not in text
    assert_goes_on(config, tmp_path / "run", tmp_path / "log", whole)


def test_a_rank_without_memory_names_the_setting_that_lets_the_run_go_on(config, whole, tmp_path):
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", {1: {"memory": "forward 5"}})
    assert codes == [1, 2], text
    (message,) = [line for line in text.splitlines() if line.startswith("[rank 1] error: ")]
    assert "no memory left in step 5, where 0 of 2 layers are recomputed, a micro-batch has 4 rows" in message
    assert (
        "Set, until it fits: --model.recompute_layers 1, then all; --training.per_device_train_batch_size 2" in message
    )
    assert "DefaultCPUAllocator: can't allocate memory" in message
    (other,) = [line for line in text.splitlines() if line.startswith("[rank 0] error: ")]
    assert f"rank 1 ({NODE}) failed in: forward, backward and update of step 5: NoMemoryLeftError: no memory" in other
    assert "Traceback" not in text
    # With another number of recomputed layers it is the same run, dropout included.
    assert_goes_on(config, tmp_path / "run", tmp_path / "log", whole, "--model.recompute_layers", "1")
    assert "recomputes the activations of 1 of 2 layers" in log_of(tmp_path / "log")


@FULL
def test_of_four_ranks_the_one_that_is_gone_is_named_and_nobody_else(config, whole, tmp_path):
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", {2: {"kill": "forward 5"}}, *SMALL, ranks=4)
    assert codes == [PREEMPTED, PREEMPTED, -9, PREEMPTED], text
    messages = [line for line in text.splitlines() if "error: " in line]
    assert len(messages) == 3
    for message in messages:
        assert f"error: rank 2 ({NODE}) is not responding" in message
        assert message.count("is not responding") == 1
    assert "resuming from" in run_to_the_end(config, tmp_path / "run", tmp_path / "log", ranks=2)


@FULL
def test_a_rank_that_is_stopped_is_named_after_the_time_allowed(config, whole, tmp_path):
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", {1: {"stop": "event 4"}})
    assert codes == [PREEMPTED, -9], text
    assert f"error: rank 1 ({NODE}) is not responding (killed or disconnected)" in text
    assert_goes_on(config, tmp_path / "run", tmp_path / "log", whole)


@pytest.mark.parametrize("place", ["forward 5", pytest.param("event 4", marks=FULL)])
def test_a_rank_that_hangs_is_named_after_the_time_out(place, config, whole, tmp_path):
    impatient = ("--distributed.timeout_minutes", "0.1")
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", {1: {"hang": place}}, *impatient)
    assert codes == [1, 1], text
    for rank in (0, 1):
        (message,) = [line for line in text.splitlines() if line.startswith(f"[rank {rank}] error: ")]
        assert "a time-out (" in message
        assert re.search(rf"while rank 1 \({NODE}\) was in: .*step {place.split()[1]}; ", message), message
    assert_goes_on(config, tmp_path / "run", tmp_path / "log", whole)


@pytest.mark.parametrize(("kind", "odd"), [("RuntimeError", 1), pytest.param("ValueError", 0, marks=FULL)])
def test_an_error_of_one_rank_is_told_by_the_others_too(kind, odd, config, whole, tmp_path):
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", {odd: {"raise": "forward 5", "kind": kind}})
    assert codes == [1, 1], text
    phase = "forward, backward and update of step 5"
    told = f"[rank {1 - odd}] error: rank {odd} ({NODE}) failed in: {phase}: {kind}: something of this rank's own; "
    assert told in text
    assert f"[rank {odd}] error: something of this rank's own" in text
    state, page = report(tmp_path / "run").splitlines()[1], (tmp_path / "run" / records.PAGE).read_text()
    assert re.match(r"  state            failed at step 5 of 12: .*something of this rank's own", state)
    assert "run failed at step 5 of 12: " in page
    assert 'http-equiv="refresh"' not in page
    assert_goes_on(config, tmp_path / "run", tmp_path / "log", whole)
    assert records.read_failure(tmp_path / "run") is None


@FULL
def test_a_rank_that_fails_to_evaluate_is_named_on_all_ranks(config, whole, tmp_path):
    faults = {1: {"raise": "evaluation", "kind": "RuntimeError"}}
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", faults)
    assert codes == [1, 1], text
    told = f"error: evaluation failed on 1 of 2 ranks: rank 1 ({NODE}): RuntimeError: something of this rank's own"
    assert told in text
    assert "is not responding" not in text
    assert_goes_on(config, tmp_path / "run", tmp_path / "log", whole)


@FULL
def test_a_data_worker_that_dies(config, whole, tmp_path):
    workers = ("--training.dataloader_num_workers", "1")
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", {1: {"worker": "forward 5"}}, *workers)
    assert codes == [1, 1], text
    assert f"[rank 0] error: rank 1 ({NODE}) failed in: " in text
    assert "DataLoader worker" in text
    assert_goes_on(config, tmp_path / "run", tmp_path / "log", whole)


def test_losses_that_are_not_finite_are_left_out_by_all_ranks(config, tmp_path):
    faults = {0: {"loss": {3: float("inf")}}, 1: {"loss": {5: float("nan"), 6: float("nan")}}}
    codes, text = broken_run(config, tmp_path / "run", tmp_path / "log", faults)
    assert codes == [0, 0], text
    skipped = [line for line in text.splitlines() if "was skipped" in line]
    assert skipped == [
        f"step 3 was skipped on all ranks: rank 0 ({NODE}): loss inf",
        f"step 5 was skipped on all ranks: rank 1 ({NODE}): loss nan",
        f"step 6 was skipped on all ranks: rank 1 ({NODE}): loss nan",
    ]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [3, 5, 6]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 4, 7, 8, 9, 10, 11, 12]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in trained)
    # The learning rate follows the steps, left out or not.
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert len(set(rates.values())) == 12
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_steps"] == 3
    before, after = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "dynamic_lora.safetensors") for n in (4, 6))
    assert not all(before[name].equal(after[name]) for name in before), "step 6's pruning took place"
    weights = [name for name in before if name.endswith((".lora_a", ".lora_b"))]
    assert all(before[name].equal(after[name]) for name in weights), "a skipped step changed the adapter"


@FULL
def test_too_many_in_a_row_end_the_run_at_its_last_good_checkpoint(config, whole, tmp_path):
    strict = ("--distributed.max_skipped_steps", "0")
    run, log = tmp_path / "run", tmp_path / "log"
    codes, text = broken_run(config, run, log, {1: {"loss": {5: float("nan")}}}, *strict)
    assert codes == [1, 1], text
    why = f"a loss or gradient that is not finite (rank 1 ({NODE}): loss nan)"
    assert f"[rank 0] error: step 5: 1 consecutive step was skipped because of {why}" in text
    assert text.count("error: ") == 1, "what all ranks of a node find is said once"
    assert f"The last good checkpoint: {run}/checkpoint-4" in text
    assert_goes_on(config, run, log, whole)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("optimizer/rank-00001.safetensors", "flip", "has changed since it was written"),
        pytest.param("dynamic_lora.safetensors", "truncate", "bytes instead of", marks=FULL),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(name, harm, message, config, whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for step in (4, 5):
        shutil.copytree(whole(2) / f"checkpoint-{step}", run / f"checkpoint-{step}")
    path = run / "checkpoint-5" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data if harm == "flip" else data[:-100])
    for record in ("metrics.jsonl", "allocation.jsonl"):
        shutil.copy(whole(2) / record, run / record)
    text = run_to_the_end(config, run, tmp_path / "log")
    assert f"passing over checkpoint-5: {name} " in text
    assert message in text
    assert f"resuming from {run}/checkpoint-4" in text
    assert_same_run(whole(2), run)


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few checkpoints, and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_full_during_a_save(config, whole, small_disk, tmp_path):
    disk, enlarge = small_disk
    codes, text = broken_run(config, disk / "run", tmp_path / "log", {})
    assert set(codes) <= {1, 2}, text
    assert re.search(rf"\[rank 0\] error: .*no room for {disk}/run/checkpoint-\d+ \(\d", text), text
    assert "Traceback" not in text
    flaws = [checkpoint.flaw_of(folder) for folder in checkpoint.checkpoints(disk / "run")]
    assert flaws[:-1] == [None] * (len(flaws) - 1)
    assert flaws[-1] is not None, "the checkpoint that did not fit passes for a complete one"
    enlarge()
    assert_goes_on(config, disk / "run", tmp_path / "log", whole)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (0, "rank 1 of 2 (connected: rank 0 ({node})) did not connect"),
        pytest.param(1, "rank 1 ({node}) could not reach rank 0", marks=FULL),
    ],
)
def test_a_rendezvous_with_a_missing_rank_ends(present, message, config, tmp_path):
    arguments = ["--config", str(config), "--output_dir", str(tmp_path / "run"), "--distributed.join_minutes", "0.05"]
    (process,) = start_ranks(one_of_two, 1, arguments, free_port(), str(tmp_path / "log"), present)
    wait_for_ranks([process], timeout=60)
    text = (tmp_path / f"log-{present}").read_text()
    assert process.exitcode == 1, text
    assert message.format(node=NODE) in text
    assert "Traceback" not in text


def one_of_two(_, __, arguments, port, log, rank):
    train_rank(rank, 2, arguments, port, log)


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["scheduler.pt", pytest.param("rng_state_0.pth", marks=FULL)])
def test_a_checkpoint_that_would_run_code_is_refused(name, config, whole, tmp_path):
    run, planted = tmp_path / "run", tmp_path / "planted"
    run.mkdir()
    folder = shutil.copytree(whole(2) / "checkpoint-5", run / "checkpoint-5")
    torch.save({"state": Planted(planted)}, folder / name)
    checkpoint.seal(folder)  # as somebody would who means harm
    codes, text = broken_run(config, run, tmp_path / "log", {})
    assert 0 not in codes
    assert "holds other Python objects than tensors and numbers, which could run code and are not loaded" in text
    assert not planted.exists()
