"""Collects facts about this process and its node, without other ranks."""

import os
import platform
import re
import resource
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from dora_dist.console.files import digest_sources

DISTRIBUTION = "dora-dist"
SHOWN_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
SHOWN = (
    "WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_JOB_ID SLURM_STEP_NUM_TASKS CUDA_VISIBLE_DEVICES OMP_NUM_THREADS "
    "DS_ACCELERATOR ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_CPU"
).split()
CONTROL_GROUPS = Path("/sys/fs/cgroup")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")


def node_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """The fields of :class:`~dora_dist.doctor.facts.RankFacts` that come from the operating system.

    Args:
        environment: variables as the launcher set them.
    """
    versions, below = software(DISTRIBUTION)
    return {
        "node": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions,
        "below": below,
        "source": digest_sources(Path(__file__).parents[1])[:8],
        "driver": driver_version(),
        "cores": tuple(sorted(os.sched_getaffinity(0))),
        "memory": memory_limit(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm": free_bytes(SHARED_MEMORY),
        "local_rank": environment.get("LOCAL_RANK"),
        "environment": shown_environment(environment),
    }


def software(distribution: str) -> tuple[dict[str, str | None], list[str]]:
    """Versions of everything a distribution requires, and the requirements that are not met.

    The requirements come from its own metadata. If it is not installed, the result shows only that.
    """
    try:
        required = [Requirement(line) for line in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        return {distribution: None}, []
    versions: dict[str, str | None] = {distribution: metadata.version(distribution)}
    below = []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        versions[requirement.name] = found = _version_of(requirement.name)
        if found is not None and not requirement.specifier.contains(found, prereleases=True):
            below.append(f"{requirement.name}{requirement.specifier}")
    return versions, below


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Version of the NVIDIA driver in the node's kernel, or None."""
    try:
        text = DRIVER_VERSION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def memory_limit() -> int:
    """Most bytes that this process may use: the node's memory, or the lower limit of its control group (Slurm's
    --mem)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        entries = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        entries = []
    for entry in entries:
        if not entry.startswith("0::/"):
            continue  # control groups version 1, which modern systems no longer use
        group = CONTROL_GROUPS / entry.removeprefix("0::/")
        for folder in (group, *group.parents):
            limits += _limit_in(folder / "memory.max")
    return min(limits)


def _limit_in(path: Path) -> list[int]:
    try:
        return [int(path.read_text(encoding="ascii"))]
    except (OSError, ValueError):  # no such file, or the word "max"
        return []


def free_bytes(folder: Path) -> int | None:
    """Bytes that a user may still write to a folder's file system; None if the folder does not exist."""
    try:
        space = os.statvfs(folder)
    except OSError:
        return None
    return space.f_bavail * space.f_frsize


def shown_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how ranks find each other and which devices they use."""
    return {
        name: value for name, value in sorted(environment.items()) if name in SHOWN or name.startswith(SHOWN_PREFIXES)
    }
