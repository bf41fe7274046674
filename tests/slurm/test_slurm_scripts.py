"""What the batch scripts make of what their ranks do, with ranks that take no time: a program in python's place."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from support.cluster import wait_for
from support.repository import REPOSITORY

pytestmark = [pytest.mark.full("slurm"), pytest.mark.timeout(120)]
SCRIPTS = sorted(p for p in (REPOSITORY / "slurm").iterdir() if p.suffix in (".sh", ".sbatch") and p.name != "site.sh")
BATCH = ["one_node.sbatch", "many_nodes.sbatch", "array.sbatch", "preemptible.sbatch"]
ONE_RANK = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"]


@pytest.fixture
def stand_in(submit, site, tmp_path):
    """``stand_in(body, script, options, *arguments, **environment)``: the number of a job whose ranks are ``body``."""

    def submitted(body, script, options, *arguments, **environment):
        program = tmp_path / "python"
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
        own = tmp_path / "site.sh"
        own.write_text(f"{site.read_text()}PATH={tmp_path}:$PATH\nexport HERE={tmp_path}\n")
        return submit(script, options, list(arguments), **{"DORA_SITE": str(own), **environment})

    return submitted


def outcome(ended):
    return [(job["JobState"], job["ExitCode"], job["Restarts"]) for job in ended]


@pytest.mark.parametrize("layout", ["2 and 2", "2 and 1"])
def test_a_rank_gets_what_a_launcher_would_set(layout, stand_in, cluster, printed, tmp_path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS ACCELERATE_USE_DEEPSPEED"
    body = f'{{ for name in {names}; do echo "$name=${{!name}}"; done; printf "%s|" "$@"; }} > "$HERE/rank-$RANK"'
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=3"]
    options += [] if layout == "2 and 2" else ["--ntasks=3"]
    options += ["--export=ALL,RANK=9,MASTER_ADDR=wrong"]
    arguments = ["--config", "with space.yaml", "--data.train", '[{"path": "a.jsonl"}]']
    job = stand_in(body, "many_nodes.sbatch", options, *arguments, OMP_NUM_THREADS="")
    assert outcome(cluster.wait(job, 30)) == [("COMPLETED", "0:0", "0")], printed(job)
    locals_, sizes = ([0, 1, 0, 1], [2, 2, 2, 2]) if layout == "2 and 2" else ([0, 1, 0], [2, 2, 1])
    for rank, (local, size) in enumerate(zip(locals_, sizes, strict=True)):
        values = [rank, local, len(sizes), size, "node1", 3, "true"]
        expected = "".join(f"{name}={value}\n" for name, value in zip(names.split(), values, strict=True))
        said = "-m|dora_dist.train|--config|with space.yaml|--data.train|" + '[{"path": "a.jsonl"}]|'
        assert (tmp_path / f"rank-{rank}").read_text() == expected + said


@pytest.mark.parametrize(
    ("engine", "state", "said"),
    [
        ("ddp", ("COMPLETED", "0:0", "0"), "DeepSpeed: no"),
        ("zero2", ("COMPLETED", "0:0", "0"), "DeepSpeed: true"),
        ("fsdp", ("FAILED", "2:0", "0"), "error: DORA_ENGINE is fsdp, but must be zero2 or ddp"),
    ],
)
def test_ranks_are_started_for_the_engine_that_is_asked_for(engine, state, said, stand_in, cluster, printed):
    options = [*ONE_RANK, "--export=ALL,ACCELERATE_USE_DEEPSPEED=wrong"]
    body = 'echo "DeepSpeed: ${ACCELERATE_USE_DEEPSPEED:-no}"'
    job = stand_in(body, "one_node.sbatch", options, DORA_ENGINE=engine)
    assert outcome(cluster.wait(job, 30)) == [state], printed(job)
    assert said in printed(job)


def test_a_wrong_configuration_fails_the_job_at_once(submit, cluster, printed):
    job = submit("preemptible.sbatch", [*ONE_RANK], ["--config", "configs/quickstart.yaml", "--pruning.intervall", "3"])
    assert outcome(cluster.wait(job, 60)) == [("FAILED", "2:0", "0")], printed(job)
    assert "intervall" in printed(job)
    assert "status 2: not requeued" in printed(job)


@pytest.mark.parametrize(("maximum", "state"), [("0", ("FAILED", "1:0", "1")), ("1", ("COMPLETED", "0:0", "1"))])
def test_requeues_are_counted_and_bounded(maximum, state, stand_in, cluster, printed):
    body = '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || exit 75'
    job = stand_in(body, "preemptible.sbatch", ONE_RANK, DORA_MAX_RESTARTS=maximum)
    assert outcome(cluster.wait(job, 60)) == [state], printed(job)
    refusal = "this job was started again 1 times, but DORA_MAX_RESTARTS is 0"
    assert (refusal in printed(job)) == (maximum == "0")


def test_every_element_of_an_array_requeues_itself_and_nothing_else(stand_in, cluster, printed):
    """The last element has the number of the whole array."""
    body = '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || exit 75'
    options = [*ONE_RANK, "--array=1-2", "--requeue"]
    job = stand_in(body, "array.sbatch", options, "--output_dir", "runs/x")
    assert outcome(cluster.wait(job, 60)) == [("COMPLETED", "0:0", "1")] * 2, printed(job)


def test_a_site_may_read_variables_that_are_not_set(stand_in, cluster, printed, site, tmp_path):
    own = tmp_path / "careless.sh"
    own.write_text(f'{site.read_text()}PATH={tmp_path}:$PATH\nexport SEEN="$NOT_SET_ANYWHERE"\n')
    job = stand_in("exit 0", "one_node.sbatch", ONE_RANK, DORA_SITE=str(own))
    assert outcome(cluster.wait(job, 30)) == [("COMPLETED", "0:0", "0")], printed(job)


def test_a_job_that_may_not_be_requeued_ends_with_the_status_of_its_ranks(stand_in, cluster, printed):
    job = stand_in("exit 75", "one_node.sbatch", ONE_RANK)
    assert outcome(cluster.wait(job, 30)) == [("FAILED", "75:0", "0")], printed(job)
    assert "submit the same command again to resume" in printed(job)


def test_ranks_that_leave_a_little_later_than_the_first_still_end_the_job_with_75(stand_in, cluster, printed):
    body = "sleep $RANK; exit 75"
    job = stand_in(body, "one_node.sbatch", ["--ntasks-per-node=3", "--gpus-per-node=1"])
    assert outcome(cluster.wait(job, 30)) == [("FAILED", "75:0", "0")], printed(job)


def until(*signals):
    """A rank that ends with 75 at one of these signals. Not bash: it never takes one that it was started ignoring."""
    handlers = "; ".join(f"signal.signal(signal.{name}, lambda *_: os._exit(75))" for name in signals)
    ready = "open(os.environ['HERE'] + '/ready-' + os.environ['RANK'], 'w')"
    program = f"import os, signal, time; {handlers}; {ready}; time.sleep(90)"
    return f'exec {sys.executable} -S -c "{program}"'


NOTICED = 'echo started >> "$HERE/started"; [ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0; '


@pytest.mark.parametrize(
    ("body", "restarts"),
    [
        # Told while it starts, when signals are ignored: it is told again.
        ("sleep 3; " + until("SIGUSR1"), "1"),
        # Killed before it could save.
        ("sleep 2; kill -KILL $$", "1"),
        # It fails while it stops: that is a failure.
        ("sleep 2; exit 1", "0"),
    ],
    ids=["while starting", "killed", "failed"],
)
def test_what_becomes_of_a_job_that_was_given_notice(body, restarts, stand_in, cluster, printed, tmp_path):
    job = stand_in(NOTICED + body, "preemptible.sbatch", ONE_RANK)
    wait_for((tmp_path / "started").exists, 30, lambda: printed(job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    expected = ("COMPLETED", "0:0", "1") if restarts == "1" else ("FAILED", "1:0", "0")
    assert outcome(cluster.wait(job, 60)) == [expected], printed(job)


def test_a_killed_rank_without_notice_is_a_failure(stand_in, cluster, printed):
    job = stand_in("kill -KILL $$", "preemptible.sbatch", ONE_RANK)
    assert outcome(cluster.wait(job, 30)) == [("FAILED", "137:0", "0")], printed(job)


LOST = 'echo "NCCL error: remote process exited or there was a network error, ncclRemoteError"; '


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (LOST, "exit 0", ("COMPLETED", "0:0", "1")),
        ("", "exit 0", ("FAILED", "134:0", "0")),
        # The log, to which both starts append, has the report of the first one.
        (LOST, "kill -ABRT $$", ("FAILED", "134:0", "1")),
    ],
    ids=["a rank was lost", "something else", "then something else"],
)
def test_ranks_that_nccl_has_aborted_go_on_where_it_lost_another(first, second, expected, stand_in, cluster, printed):
    body = f'[ -z "${{SLURM_RESTART_COUNT:-}}" ] || {{ {second}; }}; {first}kill -ABRT $$'
    job = stand_in(body, "preemptible.sbatch", ONE_RANK)
    assert outcome(cluster.wait(job, 60)) == [expected], printed(job)


@pytest.mark.parametrize(
    ("status", "notice", "reports", "goes_on"),
    [
        (75, "", 0, True),
        (134, "", 0, False),
        (134, "", 2, True),
        (137, "", 2, False),
        (137, "TERM", 0, True),
        (1, "TERM", 2, False),
    ],
)
def test_which_ends_are_worth_another_start(status, notice, reports, goes_on):
    command = f"source slurm/common.sh; notice={notice}; goes_on {status} {reports}"
    environment = {**os.environ, "SLURM_JOB_ID": "1"}
    ended = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, env=environment, timeout=20)
    assert (ended.returncode == 0) == goes_on


def test_a_cancelled_job_stays_cancelled(stand_in, cluster, printed, tmp_path):
    job = stand_in(until("SIGTERM", "SIGUSR1"), "preemptible.sbatch", ONE_RANK)
    wait_for((tmp_path / "ready-0").exists, 30, lambda: printed(job))
    cluster.run("scancel", job)
    wait_for(lambda: "requeue" in printed(job), 30, lambda: printed(job))
    (ended,) = cluster.wait(job, 30)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), printed(job)


def test_a_run_that_is_told_directly_requeues_the_job(stand_in, cluster, printed, tmp_path):
    """The signal goes to the ranks, not to the batch script: as in a preemption where no --signal is sent."""
    job = stand_in(
        NOTICED + until("SIGTERM"), "preemptible.sbatch", ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    )
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, 30, lambda: printed(job))
    cluster.run("scancel", "--signal=TERM", job)
    assert outcome(cluster.wait(job, 60)) == [("COMPLETED", "0:0", "1")], printed(job)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "an array needs --output_dir FOLDER"),
        (["--output_dir", "x"], {"SWEEP_VALUES": "1 2 3"}, "element 4 of the array has no value among the 3"),
        (["--output_dir", "x"], {"SWEEP_KEY": "training.learning_rate"}, "but SWEEP_VALUES is empty"),
    ],
)
def test_an_array_that_cannot_be_is_refused(arguments, environment, message, stand_in, cluster, printed):
    job = stand_in("true", "array.sbatch", ["--array=4", *ONE_RANK], *arguments, **environment)
    (ended,) = cluster.wait(job, 30)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert message in printed(ended["JobId"])


def test_seeds_of_an_array(stand_in, cluster, printed):
    body = 'echo "arguments: $*"'
    job = stand_in(body, "array.sbatch", ["--array=3,7", *ONE_RANK], "--config", "a.yaml", "--output_dir=runs/x")
    found = {printed(ended["JobId"]).rpartition("arguments: ")[2].strip() for ended in cluster.wait(job, 30)}
    common = "-m dora_dist.train --config a.yaml --output_dir=runs/x"
    assert found == {f"{common} --seed {n} --output_dir runs/x/seed-{n}" for n in (3, 7)}


def test_a_port_in_use_is_passed_over_and_two_jobs_never_try_the_same_one():
    def chosen(job):
        command = ["bash", "-c", f"source slurm/common.sh; choose_port {job}"]
        found = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "DORA_SITE": "none"}, capture_output=True)
        return int(found.stdout)

    first = chosen(5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", first))
        listener.listen()
        assert chosen(5) == first + 1
    assert chosen(4) + 16 == first == chosen(6) - 16


@pytest.mark.parametrize("script", BATCH)
def test_slurm_would_take_the_script_as_it_is(script, cluster):
    finished = cluster.run("sh", "-c", f"sbatch --test-only slurm/{script} 2>&1", cwd=REPOSITORY)
    assert "to start at" in finished


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    others = [REPOSITORY / "tests" / "support" / "machine.sh", *sorted((REPOSITORY / "launch").glob("*.sh"))]
    finished = subprocess.run(["shellcheck", "-x", *SCRIPTS, *others], cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
