"""Measures the scoring of all components of an 8B model in closed form, against the definition that builds matrices."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dora_dist.benchmark.options import Options
from dora_dist.benchmark.peak import clock, rise_on
from dora_dist.benchmark.shapes import NAMED
from dora_dist.console.text import MIB, say
from dora_dist.method.importance import component_scores, score_layers

Layer = tuple[Tensor, Tensor, Tensor]
"""The tensors of a layer: lora_a ``(r, in)``, gate ``(r,)``, lora_b ``(out, r)``."""
DENSE_TIMES = 3
CLOSED_TIMES = 20
QUICK_SHAPE = "8b-tiny"
OPPOSING = 1e-3
"""Relative difference of two components that otherwise cancel."""
WARMUP = 3


def measure_scoring(options: Options) -> dict[str, Any]:
    """Measure time, memory and accuracy, in float32."""
    device = torch.device(options.device)
    shape = NAMED[QUICK_SHAPE if options.quick else "8b"]
    sizes = list(shape.linears()) * shape.layers
    generator = torch.Generator(device).manual_seed(options.seed)
    say(f"scoring {len(sizes)} layers of rank {options.rank}")
    layers = [random_layer(out, width, options.rank, generator) for out, width in sizes]

    def score_all() -> Tensor:
        return score_layers(layers)

    closed = _seconds(score_all, WARMUP, CLOSED_TIMES, device)
    with rise_on(device) as closed_memory:
        score_all()
    dense = [_measure_dense(size, sizes.count(size), options.rank, generator) for size in dict.fromkeys(sizes)]
    dense_seconds = sum(one["layers"] * median(one["times"]) for one in dense)
    smallest = min(sizes, key=lambda size: size[0] * size[1])
    return {
        "shape": shape.name,
        "layers": len(sizes),
        "rank": options.rank,
        "device": options.device,
        "seconds": median(closed),
        "times": closed,
        "largest_allocation_bytes": closed_memory.largest,
        "peak_bytes": closed_memory.peak,
        "dense_seconds_extrapolated": dense_seconds,
        "dense_extrapolation": "median of one layer of each shape x layers of that shape, summed",
        "dense_by_shape": dense,
        "dense_to_closed": dense_seconds / median(closed),
        "accuracy": measure_accuracy(*smallest, options.rank, generator),
    }


def random_layer(out: int, width: int, rank: int, generator: torch.Generator) -> Layer:
    """Normally distributed factors and gates, float32."""
    a, c, b = (
        torch.randn(shape, generator=generator, device=generator.device)
        for shape in ((rank, width), (rank,), (out, rank))
    )
    return a, c, b


def dense_scores(lora_a: Tensor, gate: Tensor, lora_b: Tensor, eps: float = 1e-8) -> Tensor:
    """Equation 7 by its definition, as in the authors' code: one tensor ``(r, out, in)`` of all components."""
    components = (lora_b.T * gate[:, None])[:, :, None] * lora_a[:, None, :]
    whole: Tensor = components.sum(0).norm() + eps
    norms: Tensor = components.flatten(1).norm(dim=1)
    return norms / whole


def measure_accuracy(out: int, width: int, rank: int, generator: torch.Generator) -> dict[str, Any]:
    """Largest relative error of a layer's scores against the definition in float64: with random components, and with
    components in pairs that cancel except for a thousandth."""
    plain = random_layer(out, width, rank, generator)
    opposing = tuple(tensor.clone() for tensor in plain)
    lora_a, gate, lora_b = opposing
    half = rank // 2
    lora_a[half : 2 * half] = lora_a[:half] * (
        1 + OPPOSING * torch.randn(lora_a[:half].shape, generator=generator, device=lora_a.device)
    )
    lora_b[:, half : 2 * half] = lora_b[:, :half]
    gate[half : 2 * half] = -gate[:half]
    gate[2 * half :] = 0
    found: dict[str, Any] = {"layer": [out, width], "opposing_difference": OPPOSING}
    for name, layer in (("random", plain), ("opposing", (lora_a, gate, lora_b))):
        exact = dense_scores(layer[0].double(), layer[1].double(), layer[2].double())
        nonzero = exact != 0
        for kind, scores in (("closed", component_scores(*layer)), ("dense_float32", dense_scores(*layer))):
            error = ((scores.double() - exact).abs() / exact)[nonzero].max()
            found[f"{name}_{kind}_relative_error"] = float(error)
    return found


def _measure_dense(size: tuple[int, int], layers: int, rank: int, generator: torch.Generator) -> dict[str, Any]:
    say(f"the dense definition on {size[0]} x {size[1]}")
    layer = random_layer(*size, rank, generator)
    times = _seconds(lambda: dense_scores(*layer), 1, DENSE_TIMES, generator.device)
    return {"layer": list(size), "layers": layers, "times": times, "bytes": 4 * rank * size[0] * size[1]}


def _seconds(work: Callable[[], object], warmup: int, times: int, device: torch.device) -> list[float]:
    now = clock(device)
    found = []
    for number in range(warmup + times):
        began = now()
        work()
        if number >= warmup:
            found.append(now() - began)
    return found


def scoring_rows(record: dict[str, Any]) -> list[list[str]]:
    """Rows of a table."""
    accuracy, largest = record["accuracy"], record["largest_allocation_bytes"]
    return [
        ["scoring of", "", "value"],
        [f"all {record['layers']} layers", "ms", f"{1e3 * record['seconds']:.1f}"],
        ["by the dense definition, extrapolated", "s", f"{record['dense_seconds_extrapolated']:.1f}"],
        ["dense to closed form", "x", f"{record['dense_to_closed']:,.0f}"],
        ["largest allocation", "MiB", "-" if largest is None else f"{largest / MIB:.2f}"],
        ["peak above the parameters", "MiB", f"{record['peak_bytes'] / MIB:.2f}"],
        ["error, random components", "relative", f"{accuracy['random_closed_relative_error']:.1e}"],
        ["error, opposing components", "relative", f"{accuracy['opposing_closed_relative_error']:.1e}"],
        ["error, opposing, dense in float32", "relative", f"{accuracy['opposing_dense_float32_relative_error']:.1e}"],
    ]
