"""One start of the training command: its processes, their memory, and ways to kill them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER_PATIENCE = 60
"""Seconds that a launcher gets to end the ranks that are left: it kills them 30 s after its SIGTERM."""
SAMPLE_EVERY = 2.0
"""Seconds between two samples of the memory."""
GRACE = 5
"""Seconds that processes get to end after the launcher has ended."""
STALLED = 600
"""Seconds without a step after which a session is taken to hang."""


@dataclass(frozen=True)
class Sample:
    """Resident memory of a rank at a moment of a session.

    Args:
        rank: rank of the process.
        seconds: time since the session began.
        step: last optimizer step that was recorded.
        rss: bytes.
    """

    rank: int
    seconds: float
    step: int
    rss: int


def last_step(run: Path) -> int:
    """The last optimizer step in ``metrics.jsonl``, 0 if there is none; only the end of the file is read."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8192))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:  # half-written, or cut by the window
            continue
    return 0


class Session:
    """The launcher with its ranks, in a session of its own, until nothing of it is left.

    Args:
        arguments: arguments of ``dora_dist.train``.
        run: the run's ``output_dir``.
        log: file for what the session prints.
        processes: number of ranks.
    """

    def __init__(self, arguments: Sequence[str], run: Path, log: Path, processes: int = 2) -> None:
        launch = ("accelerate", "launch", "--config_file", "launch/zero2_cpu.yaml", "--main_process_port", "0")
        command = (*launch, "--num_processes", str(processes), "-m", "dora_dist.train", *arguments)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        self.run = run
        self.log = log
        self.samples: list[Sample] = []
        self.started = time.monotonic()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self._launcher = psutil.Process(self._process.pid)
        # Ranks have sessions of their own (torch's launcher starts them so), so every process is remembered.
        self._seen: set[psutil.Process] = {self._launcher}
        self._ranks: dict[psutil.Process, int] = {}
        self._next_sample = self.started
        self._progress = (0, self.started)

    @property
    def seconds(self) -> float:
        """Seconds since the session began."""
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Exit status of the launcher, None while it runs; looks at processes and memory in passing.

        Raises:
            RuntimeError: the session hangs.
        """
        status = self._process.poll()
        if status is None and time.monotonic() >= self._next_sample:
            self._next_sample = time.monotonic() + SAMPLE_EVERY
            self._look()
        return status

    def _look(self) -> None:
        self._find_processes()
        step, now = last_step(self.run), time.monotonic()
        if step != self._progress[0]:
            self._progress = (step, now)
        if now - self._progress[1] > STALLED:
            raise RuntimeError(f"{self.log.name}: no step for {STALLED} s")
        for process, rank in self._ranks.items():
            try:
                self.samples.append(Sample(rank, round(self.seconds, 2), step, process.memory_info().rss))
            except psutil.Error:
                continue

    def _find_processes(self) -> None:
        try:
            self._seen.update(self._launcher.children(recursive=True))
            for child in self._launcher.children():
                if child not in self._ranks and "RANK" in (variables := child.environ()):
                    self._ranks[child] = int(variables["RANK"])
        except psutil.Error:
            return  # it has just ended

    def has_ranks(self, number: int) -> bool:
        """Whether the launcher has started this many ranks."""
        self._find_processes()
        return len(self._ranks) == number

    def kill(self, ranks: Sequence[int], launcher: bool) -> None:
        """Kill the given ranks with SIGKILL, and before them the launcher if ``launcher`` is true."""
        self._find_processes()
        victims = [process for process, rank in self._ranks.items() if rank in ranks]
        for process in [self._launcher, *victims] if launcher else victims:
            _send_kill(process)

    def wait(self, timeout: float) -> int | None:
        """Exit status of the launcher; None if it has not ended in time."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None and time.monotonic() < end:
            time.sleep(0.1)
        return status

    def end(self) -> int:
        """Leave no process behind; returns the number of those that had to be killed."""
        self._find_processes()
        # Killed processes take a moment to go.
        _, left = psutil.wait_procs([process for process in self._seen if _is_running(process)], timeout=GRACE)
        for process in left:
            _send_kill(process)
        psutil.wait_procs(left, timeout=10)
        self._process.wait(timeout=10)
        return len(left)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _send_kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return  # it was faster


def left_over(run: Path) -> list[int]:
    """Processes on this machine that still train into ``run``."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if str(run) in command and "dora_dist.train" in command:
            found.append(process.pid)
    return found
