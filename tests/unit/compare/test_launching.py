"""What a worker sees of a launcher and of the machine's GPUs."""

import os

from dora_dist.compare.launching import alone, leave_launcher, worker_environment

LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "1",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "TORCHELASTIC_RUN_ID": "x",
    "PATH": "p",
}


def test_a_worker_is_a_world_of_its_own():
    assert alone(LAUNCHED) == {"PATH": "p"}


def test_a_worker_in_the_process_of_the_command_is_one_too(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(LAUNCHED, ACCELERATE_MIXED_PRECISION="bf16"))
    leave_launcher()
    assert os.environ == {"PATH": "p"}


def test_every_worker_has_one_gpu():
    seen = [worker_environment(LAUNCHED, n, 3, ["4", "GPU-7"])["CUDA_VISIBLE_DEVICES"] for n in range(3)]
    assert seen == ["4", "GPU-7", "4"]


def test_without_gpus_workers_share_the_cores_unless_told_otherwise():
    cores = len(os.sched_getaffinity(0))
    assert worker_environment({}, 0, 2, [])["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert worker_environment({"OMP_NUM_THREADS": "3"}, 0, 2, [])["OMP_NUM_THREADS"] == "3"
