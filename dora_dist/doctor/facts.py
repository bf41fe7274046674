"""Data of the doctor: plain values that ranks exchange, and the problems derived from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as this process sees it before using it.

    Args:
        uuid: identifier, the same for all processes that see this GPU.
        total: memory in bytes.
        free: memory in bytes that no process holds.
        capability: compute capability, such as ``9.0``.
        native_bf16: whether it computes in bfloat16 without emulation.
    """

    name: str
    uuid: str
    total: int
    free: int
    capability: str
    native_bf16: bool


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of a test on a device.

    Args:
        name: name of the test.
        detail: the result, for the report.
        failure: description of what is wrong, or None.
    """

    name: str
    detail: str = ""
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """A process, its node, and what it found there.

    Args:
        rank: rank in the process group; 0 without one.
        node: host name.
        versions: distribution -> version, for everything this project requires; None if it is not installed.
        below: requirements of this project that the installed versions do not meet, such as ``torch>=2.13``.
        source: short digest of this project's source files.
        cuda: CUDA version that torch was built for; None for a CPU build.
        driver: version of the node's NVIDIA driver, or None.
        cores: logical cores that this process may use.
        threads: number of threads that torch computes with.
        memory: most bytes that this process may use: the node's memory, or the limit of its control group.
        open_files: most files that this process may have open.
        shm: free bytes in /dev/shm; None if there is none.
        clock: seconds since the epoch, read on all ranks at about the same moment.
        local_rank: LOCAL_RANK as the launcher set it, or None.
        environment: variables that decide how ranks find each other.
        device: device that this rank computes on, such as ``cuda:3`` or ``cpu``.
        gpus: GPUs that this rank uses; if it runs alone, all that it sees.
        visible_gpus: number of GPUs that it sees.
        checks: tests of arithmetic on its devices.
        launch: message of :func:`~dora_dist.distributed.launcher.check_launch`, or None.
        model: the reason why the configured model cannot be found here, or None.
        sharding: the reason why this torch cannot shard the configured base, or None.
    """

    rank: int
    node: str
    python: str
    versions: Mapping[str, str | None]
    below: Sequence[str] = ()
    source: str
    cuda: str | None
    driver: str | None
    cores: Sequence[int]
    threads: int
    memory: int
    open_files: int
    shm: int | None
    clock: float
    local_rank: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    device: str
    gpus: Sequence[Gpu] = ()
    visible_gpus: int = 0
    checks: Sequence[Check] = ()
    launch: str | None = None
    model: str | None = None
    sharding: str | None = None


@dataclass(frozen=True, kw_only=True)
class StorageFacts:
    """The checkpoint folder as one rank sees it.

    Args:
        node: host name.
        sees: whether the file that rank 0 wrote is visible.
        failure: the operating system's error, or None.
        filesystem: type of the file system, such as ``lustre``; None if unknown.
        free: bytes that a user may still write; None if the folder does not exist.
        free_inodes: number of files that may still be made; None if the file system does not count them.
        write: bytes per second of writing to the disk; None on ranks that did not measure.
        read: bytes per second of reading back.
    """

    node: str
    sees: bool = False
    failure: str | None = None
    filesystem: str | None = None
    free: int | None = None
    free_inodes: int | None = None
    write: float | None = None
    read: float | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """Results of all-reduces over all ranks.

    Args:
        backend: backend of the process group, such as ``nccl``.
        failures: rank -> error on that rank.
        seconds: bytes of the tensor -> seconds of one all-reduce on the slowest rank.
    """

    backend: str
    failures: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A problem in the report.

    Args:
        where: the ranks and nodes it concerns.
        found: the finding.
        rule: the requirement that it breaks.
        action: advice.
    """

    where: str
    found: str
    rule: str
    action: str
