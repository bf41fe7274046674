"""Tests all-reduces over all ranks: first whether the sum is right, then how long they take."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from dora_dist.console.text import MIB
from dora_dist.distributed.agreement import Agreement
from dora_dist.doctor.facts import NetworkFacts

Result = TypeVar("Result")

SIZES = {"nccl": (8, MIB, 64 * MIB, 256 * MIB), "gloo": (8, MIB, 16 * MIB)}
"""Sizes of the reduced tensors in bytes: the smallest shows the latency, the largest the bandwidth."""
OTHER_SIZES = (8, MIB)
SECONDS_PER_SIZE = 2.0
MOST_ROUNDS = 20
LONGEST_SECONDS = 10.0
"""Longest expected time of an all-reduce that is started, estimated from the previous size."""
PERIOD = 7


class _FailedError(Exception):
    """The collective failed on some rank; raised on all ranks.

    Args:
        failures: rank -> error on that rank.
    """

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures


def measure_network(agreement: Agreement) -> NetworkFacts | None:
    """Reduce tensors over all ranks; None where there is no process group.

    Args:
        agreement: a :class:`~dora_dist.distributed.store_agreement.StoreAgreement`. Its gather does not use the backend
            that is measured here, so a rank whose backend fails can still report it.
    """
    backend = agreement.backend
    if backend is None:
        return None
    seconds: dict[int, float] = {}
    try:
        wrong = {rank: text for rank, text in enumerate(_on_all(agreement, lambda: _wrong_sums(agreement))) if text}
        if wrong:
            raise _FailedError(wrong)
        for size in SIZES.get(backend, OTHER_SIZES):
            last = max(seconds, default=0)
            # A small tensor's time is latency, which does not grow with the size.
            if last >= MIB and seconds[last] * size / last > LONGEST_SECONDS:
                break
            seconds[size] = _seconds_of_one(agreement, size)
    except _FailedError as error:
        return NetworkFacts(backend=backend, failures=error.failures, seconds=seconds)
    return NetworkFacts(backend=backend, seconds=seconds)


def _on_all(agreement: Agreement, work: Callable[[], Result]) -> list[Result]:
    """Results of all ranks, by rank, of work in which the backend may fail on any rank."""
    try:
        mine: tuple[Result | None, str | None] = (work(), None)
    except RuntimeError as error:
        mine = (None, f"{type(error).__name__}: " + next(iter(str(error).strip().splitlines()), "no message"))
    answers = agreement.gather(mine)
    failures = {rank: text for rank, (_, text) in enumerate(answers) if text is not None}
    if failures:
        raise _FailedError(failures)
    return [result for result, _ in answers]


def _wrong_sums(agreement: Agreement) -> str | None:
    """Sum known whole numbers, which float32 represents exactly, and compare every element."""
    pattern = torch.arange(MIB // 4, device=agreement.device, dtype=torch.float32) % PERIOD + 1
    expected = pattern * (agreement.size * (agreement.size + 1) // 2)
    total = pattern * (agreement.rank + 1)
    agreement.add_up(total)
    wrong = int((total != expected).sum())
    return f"{wrong:,} of {total.numel():,} sums are wrong" if wrong else None


def _seconds_of_one(agreement: Agreement, size: int) -> float:
    """Mean time of an all-reduce of ``size`` bytes on the slowest rank, after one warm-up that is not counted."""
    tensor = torch.zeros(size // 4, device=agreement.device)
    first = max(_on_all(agreement, lambda: _timed(agreement, tensor, 1)))
    rounds = max(1, min(MOST_ROUNDS, int(SECONDS_PER_SIZE / max(first, 1e-6))))
    return max(_on_all(agreement, lambda: _timed(agreement, tensor, rounds))) / rounds


def _timed(agreement: Agreement, tensor: torch.Tensor, rounds: int) -> float:
    _finish(agreement)
    start = time.perf_counter()
    for _ in range(rounds):
        agreement.add_up(tensor)
    _finish(agreement)
    return time.perf_counter() - start


def _finish(agreement: Agreement) -> None:
    """Wait for pending work on the GPU."""
    if agreement.device.type == "cuda":
        torch.cuda.synchronize(agreement.device)
