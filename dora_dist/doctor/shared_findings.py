"""Rules for what ranks share: the checkpoint folder and the network."""

from collections.abc import Sequence
from pathlib import Path

from dora_dist.console.text import GIB, MIB, format_bytes
from dora_dist.doctor.facts import NetworkFacts, Problem, RankFacts, StorageFacts
from dora_dist.doctor.grouping import alike, place

LEAST_SPACE = GIB
"""Least free bytes without a configuration: about a checkpoint of a 7B model whose layers start with 16 components."""
FEWEST_INODES = 1000
"""Least number of free files: a checkpoint has about 20 files, a prepared data set a few more."""
SLOW_NCCL = 1e9
"""Bus bandwidth in bytes per second that Ethernet with 10 Gbit/s gives. InfiniBand and NVLink give tens of times as
much, so a lower value means that NCCL does not use them."""
LARGE = 64 * MIB
"""Least size in bytes of a tensor that shows the bandwidth."""


def storage_problems(
    storage: Sequence[StorageFacts], ranks: Sequence[RankFacts], folder: Path, needed: int | None
) -> list[Problem]:
    """Problems with the checkpoint folder: unusable on a rank, not shared, or too small.

    Args:
        storage: facts of all ranks, by rank.
        ranks: facts of all ranks, by rank.
        folder: the checkpoint folder, ``output_dir``.
        needed: number of bytes for the configured run's checkpoints; None without a configuration.
    """
    unusable = alike(
        ranks,
        lambda facts: storage[facts.rank].failure and f"{folder}: {storage[facts.rank].failure}",
        "every rank can make, write, rename and read files in output_dir",
        "choose another folder (output_dir, or --output here), or check its permissions, quota and free space",
    )
    if storage[0].failure is not None:
        return unusable
    apart = alike(
        ranks,
        lambda facts: (
            None if storage[facts.rank].sees else f"{folder}: a file that rank 0 has just written is not there"
        ),
        "all ranks write one output_dir, on a file system that all nodes share",
        "choose a folder on the shared file system, by a path that is the same on all nodes",
    )
    # If all ranks see the same folder, rank 0's free space holds for all.
    return [*unusable, *apart, *_space_problems(storage[0], place(ranks, ranks), folder, needed)]


def _space_problems(facts: StorageFacts, where: str, folder: Path, needed: int | None) -> list[Problem]:
    problems = []
    least = LEAST_SPACE if needed is None else needed
    if facts.free is not None and facts.free < least:
        rule = "at least 1 GiB" if needed is None else f"{format_bytes(least)} for checkpoint.keep_last + 1 checkpoints"
        problems.append(
            Problem(
                where,
                f"{folder}: {format_bytes(facts.free)} are free",
                rule,
                "remove what is no longer needed there, choose another output_dir"
                + ("" if needed is None else ", or lower checkpoint.keep_last"),
            )
        )
    if facts.free_inodes is not None and facts.free_inodes < FEWEST_INODES:
        problems.append(
            Problem(
                where,
                f"{folder}: {facts.free_inodes} more files can be made",
                f"at least {FEWEST_INODES}",
                "remove files there (df -i counts them), or choose another output_dir",
            )
        )
    return problems


def network_problems(network: NetworkFacts | None, ranks: Sequence[RankFacts]) -> list[Problem]:
    """Wrong or missing sums, and NCCL without the fast network."""
    if network is None:
        return []
    prefix = "NCCL" if network.backend == "nccl" else "GLOO"
    problems = alike(
        ranks,
        lambda facts: f"{failure}" if (failure := network.failures.get(facts.rank)) else None,
        f"an all-reduce over {network.backend} gives the sum over all ranks",
        f"set {prefix}_SOCKET_IFNAME to the interface between the nodes and look for a firewall there"
        + ("; NCCL_DEBUG=INFO says more" if prefix == "NCCL" else ""),
    )
    size = max(network.seconds, default=0)
    if network.backend == "nccl" and size >= LARGE:
        speed = bus_bandwidth(size, network.seconds[size], len(ranks))
        if speed < SLOW_NCCL and len(ranks) > 1:
            problems.append(
                Problem(
                    place(ranks, ranks),
                    f"all-reduce has a bus bandwidth of {speed / 1e9:.2f} GB/s",
                    f"at least {SLOW_NCCL / 1e9:g} GB/s",
                    "see with NCCL_DEBUG=INFO which network NCCL has chosen; NCCL_SOCKET_IFNAME and NCCL_IB_HCA set "
                    "it, NCCL_IB_DISABLE and NCCL_P2P_DISABLE should not be 1",
                )
            )
    return problems


def bus_bandwidth(size: int, seconds: float, ranks: int) -> float:
    """Bytes per second over the slowest link, as nccl-tests defines it for all-reduce: size / time x 2 (n - 1) / n."""
    return size / seconds * 2 * (ranks - 1) / ranks
