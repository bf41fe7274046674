"""Made-up facts for tests of the doctor: a healthy job, of which a test changes one thing."""

import dataclasses
from typing import Any

from dora_dist.doctor.facts import Check, Gpu, RankFacts, StorageFacts

GIB = 2**30
VERSIONS = {"dora-dist": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"}


def gpu(number: int = 0, **changes: Any) -> Gpu:
    """A GPU that nobody uses."""
    healthy = Gpu(
        name="NVIDIA H100", uuid=f"GPU-{number}", total=80 * GIB, free=79 * GIB, capability="9.0", native_bf16=True
    )
    return dataclasses.replace(healthy, **changes)


def job(nodes: int = 2, ranks_per_node: int = 2, gpus: bool = True) -> list[RankFacts]:
    """Facts of all ranks of a job in which nothing is wrong."""
    world = nodes * ranks_per_node
    return [
        RankFacts(
            rank=rank,
            node=f"node{rank // ranks_per_node + 1}",
            python="3.11.7",
            versions=VERSIONS,
            source="0123abcd",
            cuda="13.0" if gpus else None,
            driver="580.1" if gpus else None,
            cores=tuple(range(16)),
            threads=8,
            memory=256 * GIB,
            open_files=65536,
            shm=64 * GIB,
            clock=1000.0,
            local_rank=str(rank % ranks_per_node),
            environment={"WORLD_SIZE": str(world), "MASTER_ADDR": "node1"},
            device=f"cuda:{rank % ranks_per_node}" if gpus else "cpu",
            gpus=(gpu(rank % ranks_per_node),) if gpus else (),
            visible_gpus=ranks_per_node if gpus else 0,
            checks=(Check(name="bfloat16 matmul", detail="right"), Check(name="nf4 layer", detail="right")),
        )
        for rank in range(world)
    ]


def changed(ranks: list[RankFacts], number: int, **changes: Any) -> list[RankFacts]:
    """The same job with other facts of one rank."""
    return [dataclasses.replace(facts, **changes) if facts.rank == number else facts for facts in ranks]


def storage(ranks: list[RankFacts], **changes: Any) -> list[StorageFacts]:
    """A shared folder without fault, as every rank finds it, with changes on all ranks."""
    found = StorageFacts(
        node="", sees=True, filesystem="lustre", free=500 * GIB, free_inodes=10**6, write=1e9, read=2e9
    )
    return [dataclasses.replace(found, node=facts.node, **changes) for facts in ranks]
