"""Agreement between ranks: the only file with collectives.

Everything goes through :class:`Agreement`, which serves one rank and many alike. A rank that fails
between two collectives reports its failure in the next one, so that all ranks raise and none waits for ever.
"""

import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dora_dist.console.errors import ExpectedRunError, mark_common
from dora_dist.distributed.heartbeat import HeartbeatMonitor

if TYPE_CHECKING:
    from dora_dist.distributed.sharded_base import ShardedBase

Result = TypeVar("Result")


class DisagreementError(ExpectedRunError):
    """Ranks that must hold the same state differ. Raised on every rank, with the same message."""


class RankFailedError(ExpectedRunError):
    """At least one rank failed, and the message names it. Raised on every rank, with the same message."""


class Agreement:
    """Collectives over all data-parallel ranks (the default process group, or this process alone).

    Args:
        device: device that tensors must be on for the process group's backend: the GPU for NCCL, the CPU for gloo.
        monitor: heartbeat monitor of the run, which is told what this rank is doing and ends with the process group.
        host_group: group of all ranks for values in host memory: flags, digests, objects. None if the default group
            serves the CPU; see :func:`~dora_dist.distributed.world.host_group`.

    Attributes:
        sharded_base: shards of the model's base, with which its forwards and backwards are collectives; None if every
            rank has the whole base.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        monitor: HeartbeatMonitor | None = None,
        host_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.size = dist.get_world_size() if self.distributed else 1
        self.device = torch.device(device)
        self._monitor = monitor
        self._host_group = host_group
        self.sharded_base: ShardedBase | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, which alone writes what all ranks have in common."""
        return self.rank == 0

    def note(self, phase: str) -> None:
        """Record what this rank is doing from now on, for messages about lost ranks."""
        if self._monitor is not None:
            self._monitor.note(phase)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on every rank. Values must pickle; for small things only."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def gather_numbers(self, number: int) -> list[int]:
        """The whole numbers of all ranks, by rank, on every rank; in host memory, and faster than :meth:`gather`."""
        if not self.distributed:
            return [number]
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(numbers, torch.tensor([number]), group=self._host_group)
        return [int(one) for one in numbers]

    def mean(self, flat: Tensor) -> Tensor:
        """Mean over the ranks of a tensor that has the same shape on all of them; the same bits on every rank."""
        if not self.distributed:
            return flat.clone()
        total = flat.to(self.device, copy=True)
        dist.all_reduce(total)
        return (total / self.size).to(flat.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on every rank. Exchanges one number in host memory and
        waits for no GPU, so it can be used in every step."""
        if not self.distributed:
            return flag
        highest = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._host_group)
        return bool(highest)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor on :attr:`device` by its sum over the ranks, without a copy; the same bits on every rank."""
        if self.distributed:
            dist.all_reduce(tensor)

    def take_first(self, tensor: Tensor) -> None:
        """Replace a tensor on :attr:`device` by that of the first rank, without a copy."""
        if self.distributed:
            dist.broadcast(tensor, 0)

    @property
    def backend(self) -> str | None:
        """Backend of the process group, such as ``nccl``; None without a process group."""
        return str(dist.get_backend()) if self.distributed else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.distributed:
            # A gather rather than dist.barrier, which guesses a device under NCCL.
            self.gather(None)

    def close(self) -> None:
        """Leave the process group at the end of a run, when all ranks have come here."""
        self.note("the end of the run")
        self.barrier()
        if self._monitor is not None:
            self._monitor.stop()
            self.barrier()  # no rank leaves while another one still watches
        if self.distributed:
            dist.destroy_process_group()

    def uneven_forwards(self) -> AbstractContextManager[None]:
        """A context in which each rank may run the model without gradients any number of times; see
        :meth:`~dora_dist.distributed.sharded_base.ShardedBase.uneven`."""
        return nullcontext() if self.sharded_base is None else self.sharded_base.uneven()

    def runs_more(self, total: int) -> int:
        """Number of extra runs of the model on this rank, with gradients or without, when ``total`` rows are dealt out
        one by one from the first rank on: with a sharded base, all ranks must run it equally often."""
        return int(self.sharded_base is not None and self.rank >= total % self.size > 0)

    def whole_weight(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which a module of the base has its whole weight; all ranks must ask for the same module."""
        return nullcontext() if self.sharded_base is None else self.sharded_base.whole(module)

    @contextmanager
    def together(self, phase: str, runs_model: bool = False) -> Iterator[None]:
        """A phase without collectives, which all ranks leave together: all without an error, or all with one. Also a
        barrier.

        Args:
            phase: the activity of the ranks, for the message.
            runs_model: whether the model runs in it, equally often on all ranks. With a sharded base this is a
                collective: a failure then ends this rank at once, and the heartbeat tells the others.

        Raises:
            RankFailedError: a rank has failed; the message names every failed rank with its failure.
            Exception: this rank's own error, if all ranks failed in the same way (a wrong file name, say).
        """
        self.note(phase)
        failure, cause = None, None
        try:
            yield
        except Exception as error:
            if runs_model and self.sharded_base is not None:
                raise
            failure, cause = f"{type(error).__name__}: {error}", error
        failures = self._exchange(failure, phase)
        if cause is not None and failures.count(failure) == self.size:
            raise mark_common(cause)
        if cause is not None:
            show_unexpected(cause)
        self._raise_failures(failures, phase)

    def of_first(self, phase: str, function: Callable[[], Result]) -> Result:
        """Call a function on the first rank, and return its result on every rank; for small values that pickle.

        Args:
            phase: the activity of the first rank, for the message.
            function: function that is called on the first rank only.

        Raises:
            ValueError: the function has raised it; the same message on every rank.
            RankFailedError: the function has failed in another way.
        """
        result, flaw = None, None
        with self.together(phase):
            if self.is_first:
                try:
                    result = function()
                except ValueError as error:
                    flaw = str(error)
        of_first: tuple[Any, str | None] = self.gather((result, flaw))[0]
        if of_first[1] is not None:
            raise mark_common(ValueError(of_first[1]))
        value: Result = of_first[0]
        return value

    def raise_together(self, failure: str | None, phase: str) -> None:
        """Exchange failures; if any rank has one, raise on all.

        Args:
            failure: description of what went wrong on this rank, or None.
            phase: the activity of the ranks, for the message.

        Raises:
            RankFailedError: a rank has failed; the message names every failed rank with its failure.
        """
        self._raise_failures(self._exchange(failure, phase), phase)

    def _exchange(self, failure: str | None, phase: str) -> list[str | None]:
        """The failures of all ranks. This rank may have to wait long for them."""
        self.note(phase + " (done on this rank, which waits for the others)" * self.distributed)
        failures = self.gather(failure)
        self.note(phase)  # for later work that notes no phase itself
        return failures

    def _raise_failures(self, by_rank: Sequence[str | None], phase: str) -> None:
        failures = {rank: text for rank, text in enumerate(by_rank) if text is not None}
        if failures:
            nodes = self.gather(platform.node())
            listed = "; ".join(f"rank {rank} ({nodes[rank]}): {text}" for rank, text in failures.items())
            raise mark_common(RankFailedError(f"{phase} failed on {len(failures)} of {self.size} ranks: {listed}"))

    def check_equal(self, digests: Mapping[str, bytes], what: str) -> None:
        """Prove that all ranks hold the same state.

        Ranks first compare one digest of everything. Only if it differs do they exchange the parts, to name the first
        part that differs.

        Args:
            digests: part (a layer, the budget, the step) -> digest of its bytes, in the same order on every rank.
            what: name of the compared state, and when it is compared, for the message.

        Raises:
            DisagreementError: the states differ; the message names the groups of ranks that agree among themselves, and
                the first differing part.
        """
        self.note(f"comparing {what}")
        whole = sha256(b"".join(name.encode() + digest for name, digest in digests.items())).digest()
        groups = _group_ranks(self.gather(whole))
        if len(groups) == 1:
            return
        parts = self.gather(dict(digests))
        first = next((name for name in digests if len({part.get(name) for part in parts}) > 1), "the list of parts")
        nodes = self.gather(platform.node())
        listed = " against ".join(_name_ranks(group, nodes) for group in groups)
        message = (
            f"the ranks disagree on {what}: {listed}; first difference in {first}. The run cannot continue: "
            "resume from the last complete checkpoint"
        )
        raise mark_common(DisagreementError(message))


def digest_tensors(*tensors: Tensor) -> bytes:
    """SHA-256 over dtype, shape and bytes of tensors, on any device; 32 bytes."""
    digest = sha256()
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def show_unexpected(error: Exception) -> None:
    """Print the traceback of an error, whose text alone reaches other ranks; but not if its text says everything."""
    if not isinstance(error, ValueError | ExpectedRunError):
        traceback.print_exception(error)


def _name_ranks(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """Ranks by their numbers; a single rank with its node."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({nodes[ranks[0]]})"
    return f"ranks {', '.join(map(str, ranks))}"


def _group_ranks(digests: Sequence[bytes]) -> list[list[int]]:
    """Ranks grouped by equal digests, the smallest group first, so that an odd one out is named first."""
    groups: dict[bytes, list[int]] = {}
    for rank, digest in enumerate(digests):
        groups.setdefault(digest, []).append(rank)
    return sorted(groups.values(), key=lambda group: (len(group), group))
