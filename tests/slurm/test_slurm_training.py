"""Real training under a real Slurm, submitted as a user does."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cluster import wait_for
from support.commands import steps_of
from support.forked_run import run_to_the_end
from support.repository import REPOSITORY
from support.same_run import assert_same_run
from support.tiny_run import write_config

from dora_dist.runs import checkpoint

pytestmark = [pytest.mark.full("slurm"), pytest.mark.timeout(240)]
LAST = 100
TWO_RANKS = ["--nodes=1", "--nodelist=node1", "--ntasks-per-node=2", "--gpus-per-node=2"]


@dataclass(frozen=True)
class Runs:
    """Jobs that ran at the same time, all on the first node."""

    config: Path
    jobs: dict[str, str]


@pytest.fixture(scope="module")
def runs(cluster, submit, printed, wheel_folder, tmp_path_factory):
    """The same run on one node and on two, and an array of two learning rates, all started at once.

    The job on two nodes is submitted from outside of the checkout, and has the wheel.
    """
    folder = tmp_path_factory.mktemp("slurm")
    config = write_config(
        folder, adapter={"dropout": 0.1}, pruning={"interval": 10}, training={"max_steps": LAST, "save_steps": 20}
    )

    def start(script, options, *arguments, **environment):
        # Held, so that all start together.
        return submit(script, ["--hold", *options], ["--config", str(config), *arguments], **environment)

    one = ["--nodelist=node1", "--ntasks-per-node=1", "--gpus-per-node=1"]
    jobs = {
        "one node": start("one_node.sbatch", TWO_RANKS, "--output_dir", str(folder / "one")),
        "two nodes": start(
            "many_nodes.sbatch",
            ["--ntasks-per-node=1", "--gpus-per-node=1"],
            *("--output_dir", str(folder / "two")),
            folder=wheel_folder / "jobs",
            DORA_SITE=str(wheel_folder / "site.sh"),
        ),
        "array": start(
            "array.sbatch",
            ["--array=0-1", *one],
            *("--output_dir", str(folder / "sweep"), "--training.max_steps", "6"),
            SWEEP_KEY="training.learning_rate",
            SWEEP_VALUES="1e-3 2e-2",
        ),
    }
    cluster.run("scontrol", "release", *jobs.values())
    for job in jobs.values():
        for ended in cluster.wait(job, timeout=180):
            assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), printed(ended["JobId"])
    return Runs(config, jobs)


def test_two_nodes_train_what_one_node_does(runs, printed):
    folder = runs.config.parent
    assert_same_pruned_run(folder / "one", folder / "two")
    assert re.findall(r"rank \d of 2: \w+, local rank \d of \d", printed(runs.jobs["two nodes"])) == [
        "rank 0 of 2: node1, local rank 0 of 1",
        "rank 1 of 2: node2, local rank 0 of 1",
    ]
    assert re.findall(r"rank \d of 2: \w+, local rank \d of \d", printed(runs.jobs["one node"])) == [
        "rank 0 of 2: node1, local rank 0 of 2",
        "rank 1 of 2: node1, local rank 1 of 2",
    ]


def test_elements_of_an_array_train_in_folders_of_their_own(runs):
    sweep = runs.config.parent / "sweep"
    assert {path.name for path in sweep.iterdir()} == {"learning_rate-1e-3", "learning_rate-2e-2"}
    rates = [max(line["learning_rate"] for line in steps_of(sweep / f"learning_rate-{r}")) for r in ("1e-3", "2e-2")]
    assert rates[1] == pytest.approx(20 * rates[0])
    assert all((path / "adapter" / "adapter_model.safetensors").exists() for path in sweep.iterdir())


def test_jobs_on_one_node_at_once_meet_at_different_ports(runs, cluster, printed):
    jobs = [found for job in runs.jobs.values() for found in cluster.jobs(job)]
    meeting = [re.search(r"rendezvous (\w+):(\d+)", printed(found["JobId"])).groups() for found in jobs]
    assert {host for host, _ in meeting} == {"node1"}
    assert len({port for _, port in meeting}) == len(jobs) == 4
    assert all(10240 <= int(port) < 32768 for _, port in meeting)
    assert max(found["StartTime"] for found in jobs) < min(found["EndTime"] for found in jobs), "not at once"


@pytest.mark.parametrize("how", ["signal", "preemption"])
def test_a_preempted_run_requeues_itself_and_ends_as_if_nothing_had_been(how, runs, cluster, submit, printed, tmp_path):
    run = tmp_path / "run"
    placed = TWO_RANKS if how == "signal" else ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    job = submit("preemptible.sbatch", placed, ["--config", str(runs.config), "--output_dir", str(run)])
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and steps_of(run), 90, lambda: printed(job))
    if how == "signal":
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    else:
        # It wants all of both nodes.
        options = ["--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/high.out"]
        high = cluster.sbatch(*options, "--wrap", "true", cwd=REPOSITORY)
        assert cluster.wait(high, 90)[0]["JobState"] == "COMPLETED"
    (ended,) = cluster.wait(job, timeout=120)
    text = printed(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    assert text.count("stopped with status 75: requeueing") == 1, text
    (step,) = re.findall(r"preempted at step (\d+): checkpoint-\d+ is complete", text)
    assert 0 < int(step) < LAST
    assert f"resuming from {run}/checkpoint-{step}" in text
    assert {checkpoint.flaw_of(path) for path in checkpoint.checkpoints(run)} == {None}
    assert_same_pruned_run(runs.config.parent / "one", run)


@pytest.mark.timeout(480)
def test_two_nodes_with_a_base_in_shards_each_train_what_one_node_does_with_whole_ones(
    cluster, submit, printed, tmp_path
):
    """Four ranks under DDP: those of a node gather layers within it, and gradients are averaged over all."""
    config = write_config(tmp_path, adapter={"dropout": 0.1}, distributed={"engine": "ddp"})
    run_to_the_end(config, tmp_path / "whole", tmp_path / "log", ranks=4, engine="ddp")
    job = submit(
        "many_nodes.sbatch",
        ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"],
        ["--config", str(config), "--output_dir", str(tmp_path / "shards"), "--distributed.shard_base", "node"],
        DORA_ENGINE="ddp",
        ACCELERATE_USE_CPU="true",
    )
    (ended,) = cluster.wait(job, timeout=300)
    text = printed(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert_same_run(tmp_path / "whole", tmp_path / "shards")
    assert len({line["allocation"] for line in steps_of(tmp_path / "shards")}) >= 3, "nothing was pruned"
    assert "the base is in 2 shards, one a rank; the ranks hold 2 copies of it" in text
    assert re.findall(r"rank \d of 4: \w+, local rank \d of \d", text) == [
        f"rank {rank} of 4: node{1 + rank // 2}, local rank {rank % 2} of 2" for rank in range(4)
    ]


def assert_same_pruned_run(expected, found):
    """The same run, and one whose masks prove something."""
    assert len(steps_of(expected)) == LAST
    assert_same_run(expected, found)
    assert len({line["allocation"] for line in steps_of(found)}) >= 3, "nothing was pruned"


def test_a_node_that_is_cut_off_is_named_and_the_run_goes_on(runs, cluster, submit, printed, tmp_path):
    run = tmp_path / "run"
    arguments = ["--config", str(runs.config), "--output_dir", str(run), "--distributed.silent_seconds", "5"]
    arguments += ["--training.save_steps", "1"]  # slow enough to be cut off on the way
    job = submit("preemptible.sbatch", ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"], arguments)
    wait_for(lambda: checkpoint.newest(run), 90, lambda: printed(job))
    cluster.cut("node2")
    try:
        rank = run_log(printed, job, 0)
        wait_for(lambda: "error: " in rank(), 60, lambda: printed(job))
        assert (
            "[rank 0] error: rank 1 (node2) is not responding (killed or disconnected); its last reported phase: "
            in rank()
        )
        assert "Traceback" not in rank()
    finally:
        cluster.heal("node2")
    # Requeued: by the script, whose ranks end with 75 for it, or by Slurm, if that has given the node up before.
    (ended,) = cluster.wait(job, timeout=120)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), printed(job)
    assert "resuming from" in printed(job)
    assert_same_pruned_run(runs.config.parent / "one", run)


def run_log(printed, job, rank):
    """What a rank of a job has printed so far."""

    def text():
        _, _, log = printed(job).partition(f"--- rank-{rank}.log\n")
        return log.partition("\n--- ")[0]

    return text


def test_the_doctor_looks_at_every_rank_of_a_job(cluster, submit, printed, tmp_path):
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0"]
    job = submit("doctor.sbatch", options, ["--output", str(tmp_path / "run")])
    (ended,) = cluster.wait(job, timeout=90)
    text = printed(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert "2 nodes, 2 ranks" in text
    assert "All-reduce over 2 ranks, gloo" in text
    assert "nothing wrong found" in text
