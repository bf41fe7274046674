"""The command line: what to measure, checked before expensive work."""

import argparse
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dora_dist.benchmark.shapes import Shape, parse_shape
from dora_dist.config.adapter import AdapterDtype
from dora_dist.config.model import KERNELS

FLOOR = "floor"
LORA = "peft-lora"
LIGER = "peft-liger"
ADALORA = "peft-adalora"
DYNAMIC = "dynamic"
PRUNED = "dynamic-pruned"
CONTESTANTS = {
    FLOOR: "the frozen base alone: forward, and backward to the inputs of its layers",
    LORA: "PEFT's LoRA of the initial rank",
    LIGER: "the same with Liger's kernels, on a GPU; only where it is named",
    ADALORA: "PEFT's AdaLoRA, its update in every step",
    DYNAMIC: "this project between two events: scoring, smoothing, DEM and an exchange of the ranks in every step",
    PRUNED: "this project after the final event",
}
CHECKPOINTING = {"off": (False,), "on": (True,), "both": (False, True)}
DTYPES = ("float32", "bfloat16")
OUTPUT = (
    "folder for results (JSON), pictures and profiles; files of the same name are replaced. By default "
    "benchmarks/results from here, which in a checkout holds the committed results: name another to keep them"
)
MOST_ROUNDS = 1000
COUNTED_SHAPE, COUNTED_LAYERS = "8b-tiny", 4
"""Contestants whose operations are counted."""
GENERATING = "measure generation with adapters that are not merged, of 7, 3 and 1 modules per block, instead"
QUICK_SHAPE, QUICK_ROUNDS, QUICK_WARMUP = "64x2", 2, 1
"""Sizes for tests of the command; the figures are meaningless."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, resolved.

    Args:
        shapes: shapes to measure.
        contestants: contestants in their order.
        rounds: number of measured rounds; in each, every contestant takes one step.
        warmup: number of rounds before them.
        dropouts: dropout values; each is a separate comparison.
        rank: components of each layer at the start, and the rank of PEFT's adapters.
        target_rank: components of each layer, on average, after the final event.
        device: ``cpu`` or ``cuda``.
        compute_dtype: dtype of the base's computation.
        adapter_dtype: dtype of the adapters' parameters.
        kernels: kernels for parts of the base model in this project's contestants; the others do not use them.
        peak_tflops: the device's peak, for utilization; None if not given.
        profile: contestant whose step is profiled, or None.
        seed: seed of weights, adapters and rows.
        quick: whether to use tiny sizes throughout, for tests.
        output: folder of the results.
    """

    shapes: tuple[Shape, ...]
    contestants: tuple[str, ...]
    rounds: int
    warmup: int
    dropouts: tuple[float, ...]
    rank: int
    target_rank: int
    device: str
    compute_dtype: str
    adapter_dtype: AdapterDtype
    kernels: tuple[str, ...]
    peak_tflops: float | None
    profile: str | None
    seed: int
    quick: bool
    output: Path


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist benchmark",
        description="Step time and peak memory of this project, the frozen base, PEFT's LoRA and PEFT's AdaLoRA: "
        "one process, one random base in NF4, the same rows, contestants in turns. Nothing is downloaded.",
        epilog="contestants: " + "; ".join(f"{name}: {text}" for name, text in CONTESTANTS.items()),
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--scoring", action="store_true", help="measure the scoring of an 8B model's components instead")
    what.add_argument(
        "--growth", action="store_true", help="measure steps by layers, width, rank and number of ranks instead"
    )
    what.add_argument(
        "--operations",
        action="store_true",
        help="count the operations of a step instead, by default of 8b-tiny with 4 layers",
    )
    what.add_argument("--generating", action="store_true", help=f"{GENERATING}; by default with 512x8")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="WIDTHxLAYERS, or 8b (for a GPU), or 8b-tiny; by default 512x8 1024x4 2048x2",
    )
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help=f"by default all but {LIGER}")
    parser.add_argument("--rounds", type=int, metavar="N", help="measured rounds; by default 20, for --growth 10")
    parser.add_argument("--warmup", type=int, metavar="N", help="rounds before the measured ones; by default 3")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0], metavar="P", help="by default 0")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, help="by default both, for 8b on")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens of a row; by default 256, for 8b 2048")
    parser.add_argument("--batch", type=int, metavar="N", help="rows of a step; by default 4, for 8b 1")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers; by default those of the shape")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="by default 4096, for 8b 128256")
    parser.add_argument("--rank", type=int, default=12, metavar="R", help="initial rank; by default 12")
    parser.add_argument("--target-rank", type=int, default=8, metavar="R", help="by default 8")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="by default cpu")
    parser.add_argument("--compute-dtype", choices=DTYPES, help="by default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--adapter-dtype",
        choices=DTYPES,
        help="by default the compute dtype, as under ZeRO-2; float32 on a bfloat16 base runs under autocast, as "
        "under DDP",
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"of {' '.join(KERNELS)}, for this project's contestants on a GPU; by default none",
    )
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="the device's peak, for the utilization")
    parser.add_argument("--profile", metavar="NAME", help="also write a profile of one step of this contestant")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="by default 0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the command; figures are meaningless")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="FOLDER", help=OUTPUT)
    return parser


def resolve(parsed: argparse.Namespace) -> Options:
    """Fill in defaults, and check the options.

    Raises:
        ValueError: an option is invalid; with its value, the rule and the option.
    """
    quick = parsed.quick
    names = parsed.shapes or ([QUICK_SHAPE] if quick else ["512x8", "1024x4", "2048x2"])
    if parsed.operations and parsed.shapes is None:
        names, parsed.layers = [COUNTED_SHAPE], parsed.layers or COUNTED_LAYERS
    if parsed.generating and parsed.shapes is None and not quick:
        names = ["512x8"]
    rounds = parsed.rounds if parsed.rounds is not None else QUICK_ROUNDS if quick else 10 if parsed.growth else 20
    warmup = parsed.warmup if parsed.warmup is not None else QUICK_WARMUP if quick else 3
    _check_numbers(parsed, rounds, warmup)
    if parsed.growth and parsed.device != "cpu":
        raise ValueError(f"--device is {parsed.device}, but --growth measures processes that share the cores of a CPU")
    contestants = _contestants(parsed)
    shapes = tuple(_shape(name, parsed) for name in names)
    compute: Literal["float32", "bfloat16"] = parsed.compute_dtype or (
        "bfloat16" if parsed.device == "cuda" else "float32"
    )
    adapter: AdapterDtype = parsed.adapter_dtype or compute
    if (compute, adapter) == ("float32", "bfloat16"):
        raise ValueError("--adapter-dtype is bfloat16, but must be float32 on a base that computes in float32")
    return Options(
        shapes=shapes,
        contestants=contestants,
        rounds=rounds,
        warmup=warmup,
        dropouts=tuple(parsed.dropout),
        rank=parsed.rank,
        target_rank=parsed.target_rank,
        device=parsed.device,
        compute_dtype=compute,
        adapter_dtype=adapter,
        kernels=_kernels(parsed),
        peak_tflops=parsed.peak_tflops,
        profile=parsed.profile,
        seed=parsed.seed,
        quick=quick,
        output=_folder(parsed.output),
    )


def check_device(device: str) -> None:
    """Refuse a GPU that does not exist.

    Raises:
        ValueError: torch sees no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device is cuda, but torch sees no GPU here: run it where there is one, or give --device cpu"
        )


def _check_numbers(parsed: argparse.Namespace, rounds: int, warmup: int) -> None:
    if not 1 <= rounds <= MOST_ROUNDS:
        raise ValueError(f"--rounds is {rounds}, but must lie in [1, {MOST_ROUNDS}]")
    if not 0 <= warmup <= MOST_ROUNDS:
        raise ValueError(f"--warmup is {warmup}, but must lie in [0, {MOST_ROUNDS}]")
    for dropout in parsed.dropout:
        if not 0 <= dropout < 1:
            raise ValueError(f"--dropout is {dropout}, but must lie in [0, 1)")
    if parsed.target_rank < 1:
        raise ValueError(f"--target-rank is {parsed.target_rank}, but must be at least 1")
    if parsed.rank < parsed.target_rank:
        raise ValueError(
            f"--rank is {parsed.rank}, below the target rank {parsed.target_rank}: pruning only removes components, "
            "so raise --rank or lower --target-rank"
        )
    if parsed.peak_tflops is not None and not parsed.peak_tflops > 0:
        raise ValueError(f"--peak-tflops is {parsed.peak_tflops}, but must be positive")
    for name in ("sequence", "batch", "layers", "vocabulary"):
        least = 1 if name in ("batch", "layers") else 2
        value = getattr(parsed, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}, but must be at least {least}")


def _kernels(parsed: argparse.Namespace) -> tuple[str, ...]:
    for name in parsed.kernels:
        if name not in KERNELS:
            raise ValueError(f"--kernels has {name!r}, but must be of {', '.join(KERNELS)}")
    if parsed.kernels and parsed.device != "cuda":
        raise ValueError(f"--kernels is given, which are for GPUs, but --device is {parsed.device}: give --device cuda")
    return tuple(name for name in KERNELS if name in parsed.kernels)


def _contestants(parsed: argparse.Namespace) -> tuple[str, ...]:
    chosen = [name for name in CONTESTANTS if name != LIGER] if parsed.contestants is None else parsed.contestants
    for option, names in (("contestants", chosen), ("profile", [parsed.profile] if parsed.profile else [])):
        for name in names:
            if name not in CONTESTANTS:
                raise ValueError(f"--{option} has {name!r}, but must be of {', '.join(CONTESTANTS)}")
    if LIGER in chosen and parsed.device != "cuda":
        raise ValueError(f"--contestants has {LIGER}, whose kernels run on GPUs only: give --device cuda, or omit it")
    if LIGER in chosen and find_spec("liger_kernel") is None:
        raise ValueError(
            f"--contestants has {LIGER}, but the package liger-kernel is not installed: pip install liger-kernel, or "
            "omit it"
        )
    if LORA not in chosen:
        raise ValueError(f"--contestants is {' '.join(chosen)}, but must include {LORA}, the reference of all ratios")
    if parsed.profile and parsed.profile not in chosen:
        raise ValueError(f"--profile is {parsed.profile}, which is not among --contestants: add it there")
    return tuple(name for name in CONTESTANTS if name in chosen)


def _shape(name: str, parsed: argparse.Namespace) -> Shape:
    shape = parse_shape(name)
    keys = ("sequence", "batch", "layers", "vocabulary")
    changes = {key: value for key in keys if (value := getattr(parsed, key)) is not None}
    if parsed.quick:
        changes = {"sequence": 16, "batch": 2, "vocabulary": 128} | changes
    if parsed.checkpointing is not None:
        changes["checkpointing"] = CHECKPOINTING[parsed.checkpointing]
    return replace(shape, **changes)


def _folder(path: Path) -> Path:
    """Check that a folder is writable, or could be created, without creating it yet."""
    existing = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output is {path}, but {existing} is not a writable folder")
    return path
