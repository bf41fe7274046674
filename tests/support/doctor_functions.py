"""What ranks run in the tests of the doctor (importable, so that a fresh process finds it)."""

from pathlib import Path

import torch.distributed as dist

from dora_dist.distributed.store_agreement import StoreAgreement
from dora_dist.doctor.facts import NetworkFacts, StorageFacts
from dora_dist.doctor.network import measure_network
from dora_dist.doctor.storage import check_storage


def agreement() -> StoreAgreement:
    return StoreAgreement("cpu", timeout_seconds=30)


def network() -> NetworkFacts | None:
    return measure_network(agreement())


def network_with_wrong_sums(wrong: int) -> NetworkFacts | None:
    """One rank is given a sum in which an element is off by one."""
    ranks = agreement()
    if ranks.rank == wrong:
        add_up = ranks.add_up

        def add_up_wrong(tensor):
            add_up(tensor)
            tensor[5] += 1

        ranks.add_up = add_up_wrong
    return measure_network(ranks)


def network_that_fails_at(size: int) -> NetworkFacts | None:
    """Tensors of so many bytes cannot be reduced by rank 1; the others learn of it from that rank."""
    ranks = agreement()
    add_up = ranks.add_up

    def add_up_or_fail(tensor):
        if tensor.nbytes != size or ranks.rank != 1:
            return add_up(tensor) if tensor.nbytes != size else None
        raise RuntimeError("connection closed by peer\nand a stack")

    ranks.add_up = add_up_or_fail
    return measure_network(ranks)


def storage(folders: list[str]) -> list[StorageFacts]:
    """The folder of each rank, which should be one."""
    rank = dist.get_rank()
    return check_storage(Path(folders[rank]), f"node{rank}", agreement(), measures=True)
