"""The commands that a user types, run as such, each with a time limit."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.repository import REPOSITORY

BIN = Path(sys.executable).parent
ZERO2_GPU = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/zero2_gpu.yaml"),
    *("--main_process_port", "0"),
)
ZERO2 = ("accelerate", "launch", "--config_file", "launch/zero2_cpu.yaml", "--main_process_port", "0")


@dataclass(frozen=True)
class Finished:
    """Exit status and what was printed, standard output and error together."""

    status: int
    output: str


def run(*command: str, timeout: float = 240, **environment: str) -> Finished:
    """Run a command in the repository; on time-out all its processes are killed.

    One thread a process, unless ``environment`` says otherwise; an empty value there unsets a variable.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    fixed = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    settings = {name: value for name, value in {**inherited, **fixed, **environment}.items() if value}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{' '.join(command)} was still running after {timeout} s:\n{output}") from None
    return Finished(process.returncode, output)


def train(config: Path, *overrides: str, processes: int = 2, engine: str = "zero2") -> Finished:
    """The entry point under the launcher of an engine; must succeed."""
    arguments = ("-m", "dora_dist.train", "--config", str(config), "--distributed.engine", engine, *overrides)
    if engine == "zero2":
        finished = run(*ZERO2, "--num_processes", str(processes), *arguments)
    elif engine == "ddp":
        finished = run("torchrun", "--nproc_per_node", str(processes), *arguments, ACCELERATE_USE_CPU="true")
    else:
        finished = run("python", *arguments)
    assert finished.status == 0, finished.output
    return finished


def steps_of(run_folder: Path) -> list[dict[str, Any]]:
    """The training lines of ``metrics.jsonl``, one per step."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]
