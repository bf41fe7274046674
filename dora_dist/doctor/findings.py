"""Rules for processes, software and nodes: derive problems from facts, without looking anything up."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from packaging.requirements import Requirement

from dora_dist.console.text import GIB, MIB, format_bytes
from dora_dist.doctor.facts import Problem, RankFacts
from dora_dist.doctor.grouping import alike, by_node, place

FEWEST_OPEN_FILES = 1024
SHM_PER_RANK = 128 * MIB
LARGEST_SKEW = 5.0
"""Most seconds by which the clocks of two nodes may differ."""


def world_problems(ranks: Sequence[RankFacts]) -> list[Problem]:
    """Problems with the world size and the launch."""
    problems = [
        *alike(
            ranks,
            lambda facts: _wrong_world(facts, len(ranks)),
            "every process joins one process group",
            "set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every task (on Slurm from SLURM_PROCID, "
            "SLURM_LOCALID and SLURM_NTASKS), or start with accelerate launch or torchrun on every node",
        ),
        *alike(
            ranks,
            lambda facts: facts.launch,
            "launcher and engine go together",
            "use the command named here; dora_dist.train refuses this launch",
        ),
        *alike(
            ranks,
            lambda facts: facts.model,
            "every rank can read the model",
            "put it where all nodes see it, and point model.path there",
        ),
        *alike(
            ranks,
            lambda facts: facts.sharding,
            "every rank's torch can gather a base from shards",
            "pip install -c launch/constraints.txt -e . on each node, or set distributed.shard_base to false",
        ),
    ]
    nodes = by_node(ranks)
    counts = Counter(len(group) for group in nodes.values())
    if len(counts) > 1:
        usual = max(counts, key=lambda count: (counts[count], count))
        odd = [facts for group in nodes.values() if len(group) != usual for facts in group]
        listed = ", ".join(f"{len(group)} on {node}" for node, group in nodes.items() if len(group) != usual)
        problems.append(
            Problem(
                place(odd, ranks),
                f"ranks per node are uneven: {listed}, {usual} elsewhere",
                "every node has as many ranks as GPUs, the same number everywhere",
                "give every node the same --num_processes, --nproc_per_node or --ntasks-per-node",
            )
        )
    return problems


def _wrong_world(facts: RankFacts, joined: int) -> str | None:
    wanted = facts.environment.get("WORLD_SIZE")
    tasks = facts.environment.get("SLURM_STEP_NUM_TASKS", "1")
    if wanted is None and tasks != "1":
        return f"Slurm started {tasks} tasks, but WORLD_SIZE is not set: each would train alone"
    if wanted is not None and wanted != str(joined):
        missing = "" if facts.local_rank is not None else " (LOCAL_RANK is not set)"
        return f"WORLD_SIZE is {wanted}, but the process group has {joined} process{'es' * (joined > 1)}{missing}"
    return None


def software_problems(ranks: Sequence[RankFacts]) -> list[Problem]:
    """Versions that are too old, missing, or different between ranks."""
    install = "pip install -c launch/constraints.txt -e ."
    problems: list[Problem] = []
    for name in dict.fromkeys(name for facts in ranks for name in facts.versions):
        problems += alike(ranks, partial(_missing, name), "what pyproject.toml requires is installed", install)
    for requirement in dict.fromkeys(text for facts in ranks for text in facts.below):
        found = partial(_too_old, requirement)
        problems += alike(ranks, found, f"{requirement}, says pyproject.toml", install)
    for name in ("Python", "dora_dist's source", "torch's CUDA", *ranks[0].versions):
        problems += alike(
            ranks,
            partial(_different, name, ranks[0]),
            "all ranks run the same versions",
            "use one environment that all nodes see, or install launch/constraints.txt on each",
        )
    return problems


def _missing(name: str, facts: RankFacts) -> str | None:
    return f"{name} is not installed" if facts.versions.get(name) is None else None


def _too_old(requirement: str, facts: RankFacts) -> str | None:
    name = Requirement(requirement).name
    return f"{name} is {facts.versions[name]}" if requirement in facts.below else None


def _different(name: str, first: RankFacts, facts: RankFacts) -> str | None:
    found, wanted = (
        {"Python": of.python, "dora_dist's source": of.source, "torch's CUDA": of.cuda, **of.versions}.get(name)
        for of in (facts, first)
    )
    if found == wanted or (name in facts.versions and found is None):  # a missing package is reported already
        return None
    return f"{name} is {found}, and {wanted} on rank {first.rank}"


def node_problems(ranks: Sequence[RankFacts]) -> list[Problem]:
    """Too few cores or open files, too little shared memory, and wrong clocks."""
    problems = [
        *alike(
            ranks,
            lambda facts: (
                f"{facts.open_files} open files are allowed" if 0 <= facts.open_files < FEWEST_OPEN_FILES else None
            ),
            f"at least {FEWEST_OPEN_FILES} (ulimit -n)",
            f"ulimit -n {64 * FEWEST_OPEN_FILES} in the batch script, or ask for a higher hard limit",
        )
    ]
    for group in by_node(ranks).values():
        first, where = group[0], place(group, ranks)
        least = SHM_PER_RANK * len(group)
        if first.shm is None or first.shm < least:
            found = "there is no /dev/shm" if first.shm is None else f"{format_bytes(first.shm)} of /dev/shm are free"
            problems.append(
                Problem(
                    where,
                    found,
                    f"{format_bytes(SHM_PER_RANK)} for every rank, for NCCL and for the workers that load data",
                    f"give the container more (docker --shm-size {max(1, least // GIB)}g or --ipc=host), or remove "
                    "left-over files there",
                )
            )
        skew = first.clock - ranks[0].clock
        if abs(skew) > LARGEST_SKEW:
            problems.append(
                Problem(
                    where,
                    f"the clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {ranks[0].node}",
                    f"clocks of nodes differ by at most {LARGEST_SKEW:g} s",
                    "fix time synchronization (chrony, ntpd) on that node; until then, logs and file times mislead",
                )
            )
        problems += _too_many_threads(group, ranks)
    return problems


def _too_many_threads(group: Sequence[RankFacts], everyone: Sequence[RankFacts]) -> list[Problem]:
    """More threads than cores on a node: of all its ranks together, or of one rank that is bound to few cores."""
    cores = len({core for facts in group for core in facts.cores})
    threads = sum(facts.threads for facts in group)
    if threads <= cores and all(facts.threads <= len(facts.cores) for facts in group):
        return []
    own = min(min(len(facts.cores) for facts in group), max(1, cores // len(group)))
    return [
        Problem(
            place(group, everyone),
            f"{len(group)} rank{'s' * (len(group) > 1)} with {threads} threads in all share {cores} cores"
            if threads > cores
            else f"a rank has {max(facts.threads for facts in group)} threads on {own} cores that it is bound to",
            "there are as many cores as threads",
            f"OMP_NUM_THREADS={own}, or more cores per task (Slurm: --cpus-per-task)",
        )
    ]
