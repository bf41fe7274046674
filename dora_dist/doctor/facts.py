"""What the doctor knows: plain values that ranks send each other, and a problem made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as this process sees it, before it has used it.

    Args:
        uuid: the same for all processes that see this GPU.
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
    """Something that was really done on a device, and how it went.

    Args:
        name: what was done.
        detail: what came out, for the report.
        failure: what is wrong, or None.
    """

    name: str
    detail: str = ""
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """A process, its node, and what it found there.

    Args:
        rank: in the process group; 0 alone.
        node: host name.
        versions: distribution -> version, of everything this project requires; None where it is not installed.
        below: requirements of this project that the installed versions do not meet, such as ``torch>=2.13``.
        source: short digest of this project's source files.
        cuda: CUDA that torch was built for; None for a CPU build.
        driver: version of the NVIDIA driver of the node, or None.
        cores: logical cores that this process may use.
        threads: that torch computes with.
        memory: bytes that this process may use at most: the node's, or the limit of its control group.
        open_files: that this process may have at once.
        shm: free bytes of /dev/shm; None where there is none.
        clock: seconds since the epoch, when all ranks were asked.
        local_rank: LOCAL_RANK as the launcher set it, or None.
        environment: variables that decide how ranks find each other.
        device: what this rank computes on, such as ``cuda:3`` or ``cpu``.
        gpus: that this rank uses; all that it sees, if it runs alone.
        visible_gpus: number of those that it sees.
        checks: of arithmetic, on its devices.
        launch: what :func:`~dora_dist.distributed.launcher.check_launch` has to say, or None.
        model: why the configured model cannot be found here, or None.
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


@dataclass(frozen=True, kw_only=True)
class StorageFacts:
    """The checkpoint folder as one rank finds it.

    Args:
        node: host name.
        sees: whether the file that rank 0 wrote is there.
        failure: what could not be done there, or None.
        filesystem: its type, such as ``lustre``; None where it is not known.
        free: bytes that a user may still write; None where the folder is not there.
        free_inodes: files that may still be made; None where the file system does not count them.
        write: bytes per second into a file, until they are on the disk; None on ranks that did not measure.
        read: bytes per second back out of it.
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
    """All-reduces over all ranks.

    Args:
        backend: of the process group, such as ``nccl``.
        failures: rank -> what went wrong there.
        seconds: bytes of the tensor -> seconds of one all-reduce, on the slowest rank.
    """

    backend: str
    failures: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Args:
        where: the ranks and nodes.
        found: what was found.
        rule: what should be.
        action: what to do.
    """

    where: str
    found: str
    rule: str
    action: str
