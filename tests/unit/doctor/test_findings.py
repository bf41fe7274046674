"""Every rule of the doctor on made-up facts: silent on a healthy job, and one problem for one thing that is wrong."""

import dataclasses
from pathlib import Path

import pytest
from support.doctor_facts import GIB, VERSIONS, changed, gpu, job, storage

from dora_dist.doctor.device_findings import device_problems
from dora_dist.doctor.facts import Check, NetworkFacts
from dora_dist.doctor.findings import node_problems, software_problems, world_problems
from dora_dist.doctor.shared_findings import bus_bandwidth, network_problems, storage_problems

MIB = 2**20
FOLDER = Path("/scratch/run")


def problems_of(ranks, dtype="auto"):
    return [
        *world_problems(ranks),
        *software_problems(ranks),
        *device_problems(ranks, dtype),
        *node_problems(ranks),
    ]


def only(problems):
    assert len(problems) == 1, problems
    problem = problems[0]
    assert problem.rule
    assert problem.action
    return problem


@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (2, 2), (3, 1)])
def test_nothing_is_wrong_with_a_healthy_job(gpus, nodes, ranks_per_node):
    ranks = job(nodes, ranks_per_node, gpus)
    assert problems_of(ranks) == []
    assert storage_problems(storage(ranks), ranks, FOLDER, GIB) == []
    assert network_problems(NetworkFacts(backend="nccl", seconds={8: 1e-5, 64 * MIB: 1e-3}), ranks) == []


# What is wrong with rank 3 of four, and what must be said of it.
ONE_RANK = {
    "not joined": ({"environment": {"WORLD_SIZE": "8"}}, "WORLD_SIZE is 8, but the process group has 4 processes"),
    "no local rank": (
        {"environment": {"WORLD_SIZE": "8"}, "local_rank": None},
        "4 processes (LOCAL_RANK is not set)",
    ),
    "slurm tasks": (
        {"environment": {"SLURM_STEP_NUM_TASKS": "4"}},
        "Slurm started 4 tasks, but WORLD_SIZE is not set",
    ),
    "wrong launch": ({"launch": "ACCELERATE_USE_CPU is set"}, "ACCELERATE_USE_CPU is set"),
    "no model": ({"model": "model.path 'x' holds no config.json"}, "holds no config.json"),
    "torch too old for shards": ({"sharding": "which needs torch 2.12 or newer"}, "needs torch 2.12 or newer"),
    "missing package": ({"versions": {**VERSIONS, "peft": None}}, "peft is not installed"),
    "another version": ({"versions": {**VERSIONS, "peft": "0.22"}}, "peft is 0.22, and 0.21.2 on rank 0"),
    "another python": ({"python": "3.12.1"}, "Python is 3.12.1, and 3.11.7 on rank 0"),
    "another checkout": ({"source": "ffff0000"}, "dora_dist's source is ffff0000, and 0123abcd on rank 0"),
    "another CUDA": ({"cuda": "12.6"}, "torch's CUDA is 12.6, and 13.0 on rank 0"),
    "no GPU there": ({"gpus": (), "driver": None}, "there is no GPU, and other ranks have one"),
    "driver but no GPU": ({"gpus": ()}, "has NVIDIA driver 580.1, but torch sees no GPU"),
    "another GPU": ({"gpus": (gpu(1, name="NVIDIA A100"),)}, "NVIDIA A100"),
    "GPU in use": ({"gpus": (gpu(1, free=60 * GIB),)}, "20.0 GiB of 80.0 GiB are in use already"),
    "no bfloat16": ({"gpus": (gpu(1, native_bf16=False, capability="7.0"),)}, "capability 7.0) has no bfloat16"),
    "wrong product": (
        {"checks": (Check(name="bfloat16 matmul", failure="on cuda:1 the result is off by 0.5"),)},
        "bfloat16 matmul: on cuda:1 the result is off by 0.5",
    ),
    "no NF4": ({"checks": (Check(name="nf4 layer", failure="RuntimeError on cuda:1"),)}, "nf4 layer: RuntimeError"),
    "few files": ({"open_files": 256}, "256 open files are allowed"),
}


@pytest.mark.parametrize(("change", "said"), ONE_RANK.values(), ids=ONE_RANK)
def test_what_is_wrong_with_one_rank_is_said_with_its_node(change, said):
    problem = only(problems_of(changed(job(), 3, **change)))
    assert said in problem.found
    assert problem.where == "rank 3 on node2"


def test_a_version_below_the_minimum_is_said_once_for_all_ranks():
    old = {**VERSIONS, "torch": "2.5.0"}
    ranks = [dataclasses.replace(facts, versions=old, below=("torch>=2.13",)) for facts in job()]
    problem = only(problems_of(ranks))
    assert (problem.where, problem.found) == ("all 4 ranks", "torch is 2.5.0")
    assert problem.rule == "torch>=2.13, says pyproject.toml"


def test_files_without_a_bound_are_enough():
    assert problems_of(changed(job(), 1, open_files=-1)) == []


def test_a_gpu_without_bfloat16_is_enough_for_float32():
    old = changed(job(1, 1), 0, gpus=(gpu(0, native_bf16=False),))
    assert device_problems(old, "float32") == []


def test_two_ranks_on_one_gpu_are_named_but_equal_gpus_of_two_nodes_are_not_one():
    problem = only(problems_of(changed(job(), 3, gpus=(gpu(0),), local_rank="0")))
    assert problem.found == "ranks 2-3 use the same GPU GPU-0 (LOCAL_RANK 0, 0)"
    assert problem.where == "ranks 2-3 on node2"


def test_gpus_without_a_rank_are_counted():
    ranks = [dataclasses.replace(facts, visible_gpus=8 if facts.node == "node2" else 2) for facts in job()]
    problem = only(problems_of(ranks))
    assert (problem.where, problem.found) == ("ranks 2-3 on node2", "2 of the 8 GPUs that are visible are used")


def test_ranks_that_are_bound_to_a_gpu_each_use_all():
    assert problems_of([dataclasses.replace(facts, visible_gpus=1) for facts in job()]) == []


def test_gpus_hidden_on_purpose_are_not_missed():
    hidden = {"environment": {"CUDA_VISIBLE_DEVICES": "-1"}, "gpus": ()}
    assert problems_of(changed(job(1, 1), 0, **hidden)) == []


def test_a_build_of_torch_for_cpus_is_the_advice_where_there_is_a_driver():
    problem = only(problems_of(changed(job(1, 1), 0, gpus=(), cuda=None)))
    assert "install the CUDA build of torch" in problem.action


def test_uneven_ranks_per_node_name_the_odd_node():
    ranks = [facts for facts in job(3, 2) if facts.rank != 5]
    ranks = [dataclasses.replace(facts, environment={"WORLD_SIZE": "5"}, visible_gpus=1) for facts in ranks]
    problem = only(problems_of(ranks))
    assert problem.found == "ranks per node are uneven: 1 on node3, 2 elsewhere"
    assert problem.where == "rank 4 on node3"


@pytest.mark.parametrize(
    ("free", "said"), [(64 * MIB, "64.0 MiB of /dev/shm are free"), (None, "there is no /dev/shm")]
)
def test_little_shared_memory_is_said_once_per_node(free, said):
    ranks = changed(changed(job(), 2, shm=free), 3, shm=free)
    problem = only(problems_of(ranks))
    assert problem.found == said
    assert problem.where == "ranks 2-3 on node2"


@pytest.mark.parametrize(("clock", "said"), [(1009.0, "9 s ahead of that of node1"), (900.0, "100 s behind")])
def test_a_wrong_clock_is_said_of_the_node(clock, said):
    ranks = changed(changed(job(), 2, clock=clock), 3, clock=clock)
    assert said in only(problems_of(ranks)).found


def test_more_threads_than_cores_on_a_node():
    ranks = changed(changed(job(), 0, threads=16), 1, threads=16)
    problem = only(problems_of(ranks))
    assert problem.found == "2 ranks with 32 threads in all share 16 cores"
    assert problem.where == "ranks 0-1 on node1"
    assert problem.action.startswith("OMP_NUM_THREADS=8,")


def test_a_rank_that_is_bound_to_fewer_cores_than_it_has_threads():
    ranks = changed(job(), 1, cores=(3, 4))
    problem = only(problems_of(ranks))
    assert problem.found == "a rank has 8 threads on 2 cores that it is bound to"
    assert problem.action.startswith("OMP_NUM_THREADS=2,")


def test_a_folder_that_rank_0_cannot_make_is_one_problem():
    ranks = job()
    facts = storage(ranks, free=None, sees=False)
    facts[0] = dataclasses.replace(facts[0], failure="Permission denied")
    problem = only(storage_problems(facts, ranks, FOLDER, None))
    assert (problem.where, problem.found) == ("rank 0 on node1", f"{FOLDER}: Permission denied")


def test_a_node_that_sees_another_folder_is_named():
    ranks = job()
    facts = [dataclasses.replace(of, sees=of.node == "node1") for of in storage(ranks)]
    problem = only(storage_problems(facts, ranks, FOLDER, None))
    assert problem.where == "ranks 2-3 on node2"
    assert "a file that rank 0 has just written is not there" in problem.found


def test_a_rank_that_cannot_write_is_named():
    ranks = job()
    facts = storage(ranks)
    facts[2] = dataclasses.replace(facts[2], failure="Disk quota exceeded")
    assert only(storage_problems(facts, ranks, FOLDER, None)).where == "rank 2 on node2"


def test_too_little_space_for_the_checkpoints_of_the_run():
    ranks = job()
    problem = only(storage_problems(storage(ranks, free=3 * GIB), ranks, FOLDER, 4 * GIB))
    assert problem.found == f"{FOLDER}: 3.00 GiB are free"
    assert problem.rule == "4.00 GiB for checkpoint.keep_last + 1 checkpoints"
    assert storage_problems(storage(ranks, free=3 * GIB), ranks, FOLDER, 2 * GIB) == []


def test_too_little_space_without_a_configuration():
    ranks = job()
    assert only(storage_problems(storage(ranks, free=10 * MIB), ranks, FOLDER, None)).rule == "at least 1 GiB"


def test_too_few_inodes_but_not_where_none_are_counted():
    ranks = job()
    assert "12 more files" in only(storage_problems(storage(ranks, free_inodes=12), ranks, FOLDER, None)).found
    assert storage_problems(storage(ranks, free_inodes=None), ranks, FOLDER, None) == []


def test_all_reduces_that_fail_name_their_ranks():
    ranks = job()
    problem = only(network_problems(NetworkFacts(backend="gloo", failures={1: "no route", 2: "no route"}), ranks))
    assert problem.where == "rank 1 on node1; rank 2 on node2"
    assert "GLOO_SOCKET_IFNAME" in problem.action


def test_a_slow_network_is_a_problem_for_nccl_only():
    ranks = job()
    slow = {64 * MIB: 1.0}
    assert "0.10 GB/s" in only(network_problems(NetworkFacts(backend="nccl", seconds=slow), ranks)).found
    assert network_problems(NetworkFacts(backend="gloo", seconds=slow), ranks) == []
    assert network_problems(NetworkFacts(backend="nccl", seconds={8: 1.0}), ranks) == []


def test_bus_bandwidth_is_that_of_nccl_tests():
    assert bus_bandwidth(1000, 2.0, 2) == 500
    assert bus_bandwidth(1000, 2.0, 8) == 875
