"""The origin of a result: date, machine, versions, and the sources it was made from."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parents[1]
"""The package's folder; its git repository gives the commit."""
NOT_INSTALLED = "not installed"
"""The version of a package that is not installed."""
RUN_PACKAGES = (
    *("dora-dist", "torch", "deepspeed", "accelerate", "transformers", "peft", "bitsandbytes", "datasets"),
    *("liger-kernel", "triton"),
)
"""Packages that the result of a training run depends on."""
COMPARE_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy")
"""Packages that the cells of ``dora_dist.compare`` depend on; each cell is one process without DeepSpeed."""
BENCHMARK_PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate", "numpy"),
    *("liger-kernel", "triton"),
)
"""Packages that the measurements of ``dora_dist.benchmark`` depend on."""
PLANTED_PACKAGES = ("torch", "transformers", "peft", "scipy")
"""Packages that the results of ``dora_dist.planted`` depend on."""


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Date, machine, versions of the packages, and commit of the sources."""
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version_of(package) for package in packages},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on."""
    return {"python": platform.python_version(), **{package: _version_of(package) for package in RUN_PACKAGES}}


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _git(*arguments: str) -> str | None:
    """Git's output for these sources; None if there is no git or no repository."""
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
