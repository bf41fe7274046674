"""Counts the operations that a step dispatches: what the host launches on a GPU, counted on any machine.

The time of a step with few tokens is determined by its launches, not by its arithmetic. Operations dispatched below
autograd are counted, except views and allocations. On a GPU, one operation may be several kernels, or part of one.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dist.benchmark.contestants import Contestant, all_conditions, build
from dora_dist.benchmark.options import LORA, Options
from dora_dist.benchmark.shapes import Shape
from dora_dist.benchmark.synthetic_base import build_base, random_rows
from dora_dist.distributed.agreement import Agreement

NO_WORK = {
    "aten::_unsafe_view",
    "aten::alias",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::promote_types",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
}
"""Views and allocations that torch does not mark as views, and operations that compute no tensor."""
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::nonzero"}
"""Operations for which the host waits until the device has computed the values."""
FROM_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy"}
"""Operations that make tensors from the host's numbers, which are copied to a GPU."""
WARMUP = 2
"""Steps before the counted one: the first steps create tensors that are kept."""


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched inside the context.

    Attributes:
        counts: name -> number of operations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for the constructor
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name == "aten::index" and any(one is not None and one.dtype == torch.bool for one in args[1]):
            name = "aten::nonzero"  # indexing by a mask calls it first
        if name in FROM_HOST or not (func.is_view or name in NO_WORK):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def figures(self) -> dict[str, Any]:
        """Number of all operations, of those for which the host waits, of those made from its numbers, and by name."""
        total = {name: count for name, count in self.counts.most_common() if name not in FROM_HOST}
        return {
            "operations": sum(total.values()),
            "reads": sum(self.counts[name] for name in READS),
            "from_host": sum(self.counts[name] for name in FROM_HOST),
            "by_name": total,
        }


def count_step(contestant: Contestant, rows: Callable[[int], Tensor]) -> dict[str, Any]:
    """Figures of one step; ``rows`` maps a step's number to its rows."""
    contestant.prepare(rows)
    for number in range(WARMUP):
        contestant.step(rows(number))
    found = Operations()
    with found:
        contestant.step(rows(WARMUP))
    return found.figures()


def count_operations(shape: Shape, options: Options, agreement: Agreement) -> list[dict[str, Any]]:
    """Count the operations; one record for each checkpointing setting and each dropout."""
    base = build_base(shape, agreement.device, getattr(torch, options.compute_dtype), options.seed)
    rows = partial(random_rows, shape, agreement.device, options.seed, agreement.rank)
    records = []
    for conditions in all_conditions(shape, base, options, agreement):
        counted = {name: count_step(build(name, conditions), rows) for name in options.contestants}
        for figures in counted.values():
            figures["ratio"] = figures["operations"] / counted[LORA]["operations"]
        records.append(
            {
                "shape": shape.name,
                "layers": shape.layers,
                "checkpointing": conditions.checkpointing,
                "dropout": conditions.dropout,
                "contestants": counted,
            }
        )
    return records


def operation_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table."""
    header = ["shape", "layers", "checkpointing", "dropout", "contestant", "operations", "of peft-lora", "reads"]
    rows = [[*header, "from host"]]
    for record in records:
        for name, figures in record["contestants"].items():
            row = [record["shape"], str(record["layers"]), "on" if record["checkpointing"] else "off"]
            row += [f"{record['dropout']:g}", name, f"{figures['operations']:,}", f"{figures['ratio']:.3f}"]
            rows.append([*row, str(figures["reads"]), str(figures["from_host"])])
    return rows
