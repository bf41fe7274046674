"""What a result is kept with: where, with what and from which sources it was measured."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parents[1]


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


PACKAGES = ("dora-dist", "torch", "deepspeed", "accelerate", "transformers", "peft", "bitsandbytes", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
