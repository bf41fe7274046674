"""What a result is kept with: where, with what and from which sources it was measured."""

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dora_dist.benchmark.options import Options

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate", "numpy")
SOURCES = Path(__file__).parents[1]


def describe(options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """Environment and settings of a measurement by ``dora_dist.benchmark``, to be called before it."""
    return {
        "command": shlex.join(["python", "-m", "dora_dist.benchmark", *arguments]),
        **environment(PACKAGES),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "compute_dtype": options.compute_dtype,
        "adapter_dtype": options.adapter_dtype,
        "rank": options.rank,
        "target_rank": options.target_rank,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "seed": options.seed,
        "quick": options.quick,
    }


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """When, where, with which versions of packages and from which sources something is measured."""
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _git(*arguments: str) -> str | None:
    """Answer of git about these sources; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=SOURCES, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
