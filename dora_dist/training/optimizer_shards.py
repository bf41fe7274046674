"""Saves the optimizer state of a ZeRO run in a form that any number of ranks can resume from.

Every rank writes the elements it owns to its own safetensors file. The first rank writes an index: which rank owns
which elements of which parameter. A rank that resumes owns other elements, and reads only those, from whichever files
hold them. DeepSpeed's own checkpoints can only be read by the number of ranks that wrote them, are pickles, and need a
separate conversion to become universal ones (docs/log.md).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_dist.console.files import read_json, write_json
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import (
    MASTER,
    counters_of,
    optimizer_counters,
    owned_parts,
    prepare_optimizer_state,
    read_counters,
)
from dora_dist.runs.checkpoint import SHARDS, shard_name

INDEX = "index.json"


class OptimizerShards:
    """Saves and restores the state of a ZeRO optimizer.

    Args:
        wrapped: DeepSpeed's engine.
        parameters: the trained parameters by name; the same names on every rank.
        agreement: collectives over the ranks.
    """

    def __init__(self, wrapped: nn.Module, parameters: Mapping[str, nn.Parameter], agreement: Agreement) -> None:
        self._wrapped = wrapped
        self._parameters = parameters
        self._agreement = agreement
        parts = owned_parts(wrapped, parameters)
        mine = {name: (part.start, part.tensors[MASTER].numel()) for name, part in parts.items()}
        self._owners: dict[str, list[tuple[int, int, int]]] = {name: [] for name in parameters}
        for rank, owned in enumerate(agreement.gather(mine)):
            for name, (start, count) in owned.items():
                self._owners[name].append((rank, start, count))
        for name, parameter in parameters.items():
            covered = sum(count for _, _, count in self._owners[name])
            assert covered == parameter.numel(), f"{covered} of {parameter.numel()} elements of {name} have an owner"

    def check(self) -> None:
        """Refuse an optimizer whose state cannot be split among ranks, after its first step. No collectives.

        Raises:
            ValueError: names the state that cannot be split.
        """
        owned_parts(self._wrapped, self._parameters)

    def save(self, folder: Path) -> None:
        """Write this rank's part to a checkpoint's folder; the first rank also writes the index. No collectives."""
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        parts = owned_parts(self._wrapped, self._parameters)
        tensors = {
            f"{name}:{key}": tensor.cpu() for name, part in parts.items() for key, tensor in part.tensors.items()
        }
        save_file(tensors, folder / shard_name(self._agreement.rank))
        if self._agreement.is_first:
            counters = optimizer_counters(self._wrapped)
            write_json(folder / SHARDS / INDEX, {"owners": self._owners, "counters": counters})

    def load(self, folder: Path, step: int) -> None:
        """Restore the state from a checkpoint written by any number of ranks. No collectives.

        Args:
            folder: the checkpoint's folder.
            step: number of optimizer steps taken at the checkpoint.

        Raises:
            ValueError: the state belongs to other parameters.
        """
        index = read_json(folder / SHARDS / INDEX)
        owners: dict[str, list[tuple[int, int, int]]] = index["owners"]
        if owners.keys() != self._parameters.keys():
            strange = sorted(owners.keys() ^ self._parameters.keys())
            raise ValueError(
                f"{folder / SHARDS} holds parameters that this model does not have: {', '.join(strange[:3])} ..."
            )
        with _Files(folder) as files:
            prepare_optimizer_state(self._wrapped, files.state_dtypes(), index["counters"], step)
            for name, part in owned_parts(self._wrapped, self._parameters).items():
                for key, target in part.tensors.items():
                    _fill(target, part.start, files.pieces(f"{name}:{key}", owners[name]))

    def take_over(self, whole: "WholeState", step: int) -> None:
        """Take over from the checkpoint of an engine under which every rank holds the whole optimizer. No collectives.

        Args:
            whole: the optimizer and the parameters in that checkpoint.
            step: number of optimizer steps taken at the checkpoint.
        """
        first = next(iter(whole.states.values()), {})
        dtypes = {key: value.dtype for key, value in first.items() if isinstance(value, Tensor) and value.ndim}
        # Every step is one of all parameters, so the counters of the first one hold for all.
        prepare_optimizer_state(self._wrapped, dtypes, counters_of(first), step)
        for name, part in owned_parts(self._wrapped, self._parameters).items():
            for key, target in part.tensors.items():
                source = whole.parameters[name] if key == MASTER else whole.states[name][key]
                target.copy_(source.flatten().narrow(0, part.start, target.numel()))


@dataclass(frozen=True)
class WholeState:
    """The optimizer and the parameters in a checkpoint of an engine under which every rank holds the whole optimizer.

    Attributes:
        states: name of a parameter -> the optimizer's state of it.
        parameters: name of a parameter -> the parameter as it was saved.
    """

    states: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Tensor]


def is_sharded(folder: Path) -> bool:
    """Whether ZeRO wrote the optimizer of a checkpoint."""
    return (folder / SHARDS / INDEX).is_file()


def load_whole(folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Restore an optimizer that every rank holds as a whole from a checkpoint that ZeRO wrote. The parameters get the
    values of ZeRO's master copy. No collectives.

    Args:
        folder: the checkpoint's folder.
        optimizer: the optimizer, as torch made it.
        names: parameter -> its name.
    """
    index = read_json(folder / SHARDS / INDEX)
    with _Files(folder) as files:
        dtypes = {MASTER: torch.float32, **files.state_dtypes()}
        for group, counters in zip(optimizer.param_groups, index["counters"], strict=True):
            for parameter in group["params"]:
                name = names[parameter]
                found = {key: torch.empty(parameter.numel(), dtype=dtype) for key, dtype in dtypes.items()}
                for key, target in found.items():
                    _fill(target, 0, files.pieces(f"{name}:{key}", index["owners"][name]))
                parameter.data.copy_(found.pop(MASTER).view_as(parameter))
                state = {key: value.view_as(parameter).to(parameter.device) for key, value in found.items()}
                optimizer.state[parameter] = {**state, **read_counters(counters, group, parameter.device)}


class _Files:
    """The shards of a checkpoint, each opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._opened: dict[int, Any] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    def _file(self, rank: int) -> Any:
        if rank not in self._opened:
            self._opened[rank] = self._stack.enter_context(safe_open(self._folder / shard_name(rank), "pt"))
        return self._opened[rank]

    def state_dtypes(self) -> dict[str, torch.dtype]:
        """dtype of each tensor of the optimizer's state, except the master copy."""
        first = self._file(0)
        found: dict[str, torch.dtype] = {}
        for full in first.keys():  # noqa: SIM118 (not a dictionary)
            key = full.rpartition(":")[2]
            if key != MASTER and key not in found:
                found[key] = first.get_tensor(full).dtype
        return found

    def pieces(self, name: str, owners: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, Any]]:
        """For each piece of a tensor: its start, its length, and a function that opens it for reading a range."""
        for rank, start, count in owners:
            yield start, count, lambda rank=rank: self._file(rank).get_slice(name)


def _fill(target: Tensor, first: int, pieces: Iterator[tuple[int, int, Any]]) -> None:
    """Copy into ``target`` those elements of ``pieces`` that start at ``first``, as far as they overlap."""
    end = first + target.numel()
    for start, count, open_slice in pieces:
        low, high = max(start, first), min(start + count, end)
        if low < high:
            target[low - first : high - first].copy_(open_slice()[low - start : high - start])
