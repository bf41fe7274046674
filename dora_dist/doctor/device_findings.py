"""Rules for GPUs, and for the results of arithmetic on devices."""

from collections.abc import Sequence
from functools import partial

from dora_dist.console.text import format_bytes, ranges
from dora_dist.doctor.facts import Problem, RankFacts
from dora_dist.doctor.grouping import alike, by_node, listed, place

HELD_SHARE = 0.1
"""Share of a GPU's memory that others may hold: its display, a context, this process itself."""
HIDDEN = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs on purpose."""


def device_problems(ranks: Sequence[RankFacts], compute_dtype: str) -> list[Problem]:
    """All problems with the ranks' devices.

    Args:
        ranks: facts of all ranks, by rank.
        compute_dtype: ``model.compute_dtype`` of the configuration; ``auto`` without one.
    """
    return [*gpu_problems(ranks, compute_dtype), *arithmetic_problems(ranks)]


def gpu_problems(ranks: Sequence[RankFacts], compute_dtype: str) -> list[Problem]:
    """GPUs that are missing, shared, mixed, in use by others, or without bfloat16."""
    first = next((gpu.name for facts in ranks for gpu in facts.gpus), None)
    problems = [
        *_shared_gpus(ranks),
        *_idle_gpus(ranks),
        *alike(ranks, lambda facts: _no_gpu(facts, first), *_no_gpu_advice(ranks)),
        *alike(
            ranks,
            lambda facts: listed(gpu.name for gpu in facts.gpus if gpu.name != first),
            f"all ranks have the same GPU; here the first is {first}",
            "ask for one type (Slurm: --gres=gpu:TYPE:N or --constraint): the slowest one sets the pace",
        ),
        *alike(
            ranks,
            lambda facts: listed(
                f"{format_bytes(gpu.total - gpu.free)} of {format_bytes(gpu.total)} are in use already on "
                f"{gpu.name} {gpu.uuid}"
                for gpu in facts.gpus
                if gpu.total - gpu.free > HELD_SHARE * gpu.total
            ),
            f"at most {HELD_SHARE:.0%} of a GPU's memory is held by others",
            "look for left-over processes with nvidia-smi on that node and end them, or ask for another node",
        ),
    ]
    if compute_dtype != "float32":
        problems += alike(
            ranks,
            lambda facts: listed(
                f"{gpu.name} (compute capability {gpu.capability}) has no bfloat16"
                for gpu in facts.gpus
                if not gpu.native_bf16
            ),
            "bfloat16 needs compute capability 8.0 or newer",
            "ask for Ampere or newer, or set model.compute_dtype to float32: twice the memory, and slower",
        )
    return problems


def _no_gpu(facts: RankFacts, first: str | None) -> str | None:
    if facts.gpus or facts.environment.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return None
    if facts.driver is not None:
        return f"the node has NVIDIA driver {facts.driver}, but torch sees no GPU"
    return None if first is None else "there is no GPU, and other ranks have one"


def _no_gpu_advice(ranks: Sequence[RankFacts]) -> tuple[str, str]:
    cpu_build = any(facts.cuda is None and not facts.gpus for facts in ranks)
    action = "install the CUDA build of torch: this one is for CPUs only" if cpu_build else ""
    return "every rank has a GPU, or none has", action or "ask for GPUs (Slurm: --gres=gpu:N), and look at nvidia-smi"


def _shared_gpus(ranks: Sequence[RankFacts]) -> list[Problem]:
    users: dict[tuple[str, str], list[RankFacts]] = {}
    for facts in ranks:
        for gpu in facts.gpus:
            users.setdefault((facts.node, gpu.uuid), []).append(facts)
    return [
        Problem(
            place(group, ranks),
            f"ranks {ranges([facts.rank for facts in group])} use the same GPU {uuid} "
            f"(LOCAL_RANK {', '.join(facts.local_rank or 'not set' for facts in group)})",
            "every rank has a GPU of its own; NCCL refuses anything else",
            "start one process per GPU, with LOCAL_RANK from 0 on every node",
        )
        for (_, uuid), group in users.items()
        if len(group) > 1
    ]


def _idle_gpus(ranks: Sequence[RankFacts]) -> list[Problem]:
    """Nodes on which ranks see more GPUs than they use. Shared and missing GPUs are reported elsewhere."""
    problems = []
    for group in by_node(ranks).values():
        used = len({gpu.uuid for facts in group for gpu in facts.gpus})
        seen = max(facts.visible_gpus for facts in group)
        if all(facts.gpus for facts in group) and used == sum(len(facts.gpus) for facts in group) < seen:
            problems.append(
                Problem(
                    place(group, ranks),
                    f"{used} of the {seen} GPUs that are visible are used",
                    "every GPU of the allocation has a rank",
                    f"start {seen} processes on the node (--num_processes counts those of all nodes), or ask for fewer",
                )
            )
    return problems


def arithmetic_problems(ranks: Sequence[RankFacts]) -> list[Problem]:
    """Devices that compute wrong results, or none."""
    problems: list[Problem] = []
    for name in dict.fromkeys(check.name for facts in ranks for check in facts.checks):
        problems += alike(
            ranks,
            partial(_failure, name),
            "the result is right within rounding",
            "see what python -m bitsandbytes says, and reinstall it and torch for the driver of that node"
            if "layer" in name
            else "try another node; if it computes right there, report the GPU of this one",
        )
    return problems


def _failure(name: str, facts: RankFacts) -> str | None:
    return listed(f"{name}: {check.failure}" for check in facts.checks if check.name == name and check.failure)
