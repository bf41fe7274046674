"""Connects the ranks of a job as the trainer does, and collects each rank's facts."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch

from dora_dist.base_model.load import BaseModelSpec, find_model, load_skeleton, resolve_compute_dtype
from dora_dist.console.errors import ExpectedRunError
from dora_dist.distributed.launcher import check_launch, check_precision, launched, with_deepspeed
from dora_dist.distributed.rendezvous import join_rendezvous
from dora_dist.distributed.store_agreement import StoreAgreement
from dora_dist.distributed.world import connect, host_group
from dora_dist.doctor.device import check_device, describe_gpus
from dora_dist.doctor.facts import RankFacts
from dora_dist.doctor.node import node_facts
from dora_dist.setup.sharding import check_torch

if TYPE_CHECKING:
    from dora_dist.config.run import RunConfig

FLOAT32 = 4
KEPT_COPIES = 3
"""Number of copies of the adapter in a checkpoint, beside the optimizer's moments: our own file, ZeRO's float32 master
copy, and the plain LoRA adapter, which is smaller once components have been pruned."""
MOMENTS = 2
"""Number of Adam's moments."""
SLACK_SECONDS = 30.0
"""Time that ranks wait for each other beyond the time-out of a collective, which may have to fail first."""


def join(timeout_seconds: float) -> StoreAgreement:
    """Join the process group as ``dora_dist.train`` would; alone without a launcher.

    Raises:
        ExpectedRunError: not all ranks have connected.
    """
    # With this, an all-reduce that hangs raises after the time-out instead of aborting the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    engine = "zero2" if with_deepspeed(os.environ) else "ddp" if launched(os.environ) else "none"
    if launched(os.environ):
        join_rendezvous(timeout_seconds, "--timeout")
    try:
        state = connect(engine, timeout_seconds / 60)
        host_group(timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        wanted = os.environ.get("WORLD_SIZE", "?")
        said = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise ExpectedRunError(
            f"this rank could not join the {wanted} ranks of the job at MASTER_ADDR:MASTER_PORT {where} within "
            f"{timeout_seconds:g} s, although all have connected there: {said} Check the firewall, and the "
            "interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or raise --timeout"
        ) from None
    assert state.device is not None
    return StoreAgreement(state.device, timeout_seconds + SLACK_SECONDS)


def inspect_rank(
    agreement: StoreAgreement, config: "RunConfig | None", environment: Mapping[str, str]
) -> list[RankFacts]:
    """Collect the facts of every process, its node and its devices.

    Args:
        agreement: collectives over all ranks.
        config: configuration of the run to prepare for, if there is one.
        environment: variables as the launcher set them; connecting the ranks sets others.

    Returns:
        Facts of all ranks, by rank, on every rank.

    Raises:
        RankFailedError: a rank failed.
    """
    with agreement.together("looking at the nodes"):
        facts = node_facts(environment)
        devices = _devices(agreement.device)
        gpus = describe_gpus(devices)
        name, quantization = (config.model.compute_dtype, config.model.quantization) if config else ("auto", "nf4")
        checks = [
            check for device in devices for check in check_device(device, resolve_compute_dtype(name), quantization)
        ]
        # After DeepSpeed's imports, because some of them change the number of threads.
        facts.update(threads=torch.get_num_threads(), cuda=torch.version.cuda, device=str(agreement.device))
        facts.update(visible_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0)
        facts.update(launch=_launch_failure(config, environment), **_refusals(config))
        facts.update(gpus=gpus, checks=tuple(checks))
    clock = _clock(agreement)
    return agreement.gather(RankFacts(rank=agreement.rank, clock=clock, **facts))


def _clock(agreement: StoreAgreement) -> float:
    """The node's time, read on all ranks at about the same moment."""
    agreement.barrier()
    return time.time()


def _devices(own: torch.device) -> Sequence[torch.device]:
    """Devices that this process tests: a rank its own, a single process all GPUs of the node."""
    if own.type != "cuda" or launched(os.environ):
        return [own]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def _launch_failure(config: "RunConfig | None", environment: Mapping[str, str]) -> str | None:
    """The error of dora_dist.train for this launch; None if it is right. Without a launcher, only the precision that
    accelerate would take is checked, since ``accelerate launch`` of one process sets no other variable."""
    engine = config.distributed.engine if config else "zero2" if with_deepspeed(environment) else None
    if engine is None:
        return None
    name = config.model.compute_dtype if config else "auto"
    dtype = str(resolve_compute_dtype(name)).removeprefix("torch.")
    launch = _refusal(partial(check_launch, engine, environment)) if launched(environment) else None
    return launch or _refusal(partial(check_precision, dtype, environment))


def _refusals(config: "RunConfig | None") -> dict[str, str | None]:
    """Name of a fact -> the error of dora_dist.train, or None: for the model's folder (names on the Hub are not looked
    up), and for sharding the base with this torch."""
    if config is None:
        return {}
    return {
        "model": _refusal(partial(find_model, config.model.path)),
        "sharding": _refusal(partial(check_torch, config, torch.__version__)),
    }


def _refusal(check: Callable[[], object]) -> str | None:
    """The message of a failed check; None if it passes."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def checkpoint_bytes(config: "RunConfig") -> int | None:
    """Approximate size of one checkpoint of the run, in bytes; None if the model's configuration cannot be read.

    Counted are the adapter at its start rank and Adam's moments, all in float32.
    """
    from dora_dist.adapter.ranks import resolve_ranks
    from dora_dist.base_model.shape import read_shape
    from dora_dist.memory.activations import Adapter

    try:
        skeleton = load_skeleton(BaseModelSpec.of(config.model, config.task))
        shape = read_shape(skeleton, resolve_ranks(skeleton, config.adapter))
    except ValueError:
        return None
    adapter = Adapter(bytes_per_element=FLOAT32, dropout=False)
    return (KEPT_COPIES + MOMENTS) * FLOAT32 * adapter.numel(shape)
