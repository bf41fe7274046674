"""The soak: a run that is killed again and again ends like one that was left alone, and does not grow.

    python benchmarks/soak.py --minutes 30 --seed 0 --output runs/soak
    python benchmarks/soak.py --minutes 30 --seed 0 --output runs/elastic --ranks 2 1

Two ranks under ZeRO-2 train the quickstart's backbone with its preset, with evaluations, by the command that a user
types. First a short run measures a step, which sets the number of steps; then the run is left alone; then it runs again
in another folder, is killed with SIGKILL about every minute (one rank, all ranks, or the launcher with them; while it
starts, trains, or has just begun to save) and is started again with the same command, until it is done.

With one number of ranks there is dropout, and the runs must be equal bit for bit. With several, each session of the
killed run has one of them by lot, with the same global batch; there is no dropout, whose random numbers depend on the
ranks, and the runs must agree within float32 rounding as it grows over so many steps (``soak_judge.MOST_APART``).

``RESULT.json`` has the kills, the memory of all ranks (a slope only for sessions of 2000 steps or more) and the
comparison. Exit status 1 if the runs differ, memory grows, a process is left, or a session ends by itself other than
well. Takes more than twice the minutes asked for; half of it with ``--reference``, the folder of an earlier soak to
whose run that was left alone the killed one is compared.
"""

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soak_judge import differences, distances, environment, growth, judge, peak, summarize, too_far
from soak_session import LAUNCHER_PATIENCE, REPOSITORY, Session, last_step, left_over

GLOBAL_BATCH = 8
CALIBRATION_STEPS = 60
START_UP = 10.0
"""Seconds after the ranks have been started within which a kill counts as one while starting."""
SAVE = 0.3
"""Seconds after a checkpoint folder has appeared within which a kill counts as one of a save."""
ONE_RANK, ALL_RANKS, LAUNCHER = "one rank", "all ranks", "launcher and ranks"
"""Victims of a kill."""


@dataclass(frozen=True)
class Plan:
    """The planned end of the next session.

    Args:
        ranks: number of ranks of the session.
        phase: ``start-up``, ``training`` or ``save``.
        victims: the victims of the kill.
        rank: the rank to be killed, where it is one.
        wait: seconds until the kill, from the start of the ranks, or from the session's first step.
        delay: seconds after the next checkpoint folder has appeared, for ``save``.
    """

    ranks: int
    phase: str
    victims: str
    rank: int
    wait: float
    delay: float


def draw_plan(source: random.Random, kill_every: float, ranks: Sequence[int]) -> Plan:
    """One session and its kill: a tenth while starting, four tenths in a save, the rest wherever it falls."""
    number = source.choice(ranks)
    phase = source.choices(("start-up", "training", "save"), (1, 5, 4))[0]
    wait = source.uniform(0, START_UP) if phase == "start-up" else kill_every * source.uniform(0.25, 1.75)
    victims = source.choice((ONE_RANK, ALL_RANKS, LAUNCHER))
    return Plan(number, phase, victims, source.randrange(number), wait, source.uniform(0, SAVE))


class Soak:
    """The runs of one soak, in one folder.

    Args:
        output: folder for everything; must be new.
        kill_every: approximate seconds from the first step of a session to its kill.
        seed: seed of the kills.
        ranks: numbers of ranks that the sessions of the killed run draw from; all other runs have the first one.
    """

    def __init__(self, output: Path, kill_every: float, seed: int, ranks: Sequence[int]) -> None:
        self.output = output
        self.kill_every = kill_every
        self.source = random.Random(seed)
        self.ranks = ranks
        self.sessions: list[dict[str, Any]] = []
        self._running: Session | None = None

    @property
    def is_elastic(self) -> bool:
        """Whether the killed run goes on with other numbers of ranks."""
        return len(set(self.ranks)) > 1

    def arguments(self, run: Path, steps: int, save_every: int, ranks: int) -> list[str]:
        """The arguments of ``dora_dist.train``."""
        values = {
            "output_dir": run,
            "adapter.dropout": 0.0 if self.is_elastic else 0.1,
            "pruning.interval": max(1, steps // 40),
            "evaluation.before": "false",
            "evaluation.exact_match": "false",
            "checkpoint.keep_last": 2,
            "data.cache_dir": self.output / "cache",
            "training.max_steps": steps,
            "training.per_device_train_batch_size": GLOBAL_BATCH // ranks,
            "training.learning_rate": 1e-3,
            "training.logging_steps": 1,
            "training.save_steps": save_every,
            "training.eval_strategy": "steps",
            "training.eval_steps": max(1, steps // 8),
            "training.report_to": "none",
        }
        listed = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return ["--config", "configs/quickstart.yaml", *listed]

    def calibrate(self) -> float:
        """Seconds of a step: the quickest fifth, so that the run does not end before its time."""
        run = self.output / "calibration"
        self.run_whole(run, CALIBRATION_STEPS, CALIBRATION_STEPS)
        from dora_dist.console.files import read_lines

        lines = [line for line in read_lines(run / "metrics.jsonl") if "seconds_per_step" in line]
        return statistics.quantiles([line["seconds_per_step"] for line in lines[10:]], n=5)[0]

    def start(self, run: Path, steps: int, save_every: int, ranks: int, name: str) -> Session:
        arguments = self.arguments(run, steps, save_every, ranks)
        self._running = Session(arguments, run, self.output / f"{name}.log", ranks)
        return self._running

    def end(self) -> int:
        """Leave no process of the current session; returns how many had to be killed."""
        return self._running.end() if self._running else 0

    def run_whole(self, run: Path, steps: int, save_every: int) -> dict[str, Any]:
        """A run that is left alone."""
        session = self.start(run, steps, save_every, self.ranks[0], run.name)
        while (status := session.poll()) is None:
            time.sleep(0.2)
        self.end()
        refuse(status, session)
        return {**memory(session), "seconds": round(session.seconds, 1)}

    def run_killed(self, run: Path, steps: int, save_every: int) -> None:
        """Start, kill, start again, until the run is done."""
        while True:
            before = last_step(run)
            plan = draw_plan(self.source, self.kill_every, self.ranks)
            session = self.start(run, steps, save_every, plan.ranks, f"killed-{len(self.sessions):03d}")
            killed = self.wait_and_kill(session, plan)
            status = session.wait(LAUNCHER_PATIENCE if killed else 0)
            stepped, resumed = has_stepped(session.log), resumed_step(session.log)
            self.sessions.append(
                {
                    "ranks": plan.ranks,
                    "kill": asdict(plan) if killed else None,
                    "stepped": stepped,
                    "resumed_from_step": resumed,
                    # A session that was killed before its first step has not retaken the lost ones.
                    "steps_taken_again": before - resumed if stepped else 0,
                    "last_step": last_step(run),
                    "unfinished_checkpoint_left": has_unfinished_checkpoint(run),
                    "launcher_status": status,
                    "seconds": round(session.seconds, 1),
                    "processes_to_clean_up": self.end(),
                    **memory(session),
                }
            )
            print(describe(len(self.sessions), self.sessions[-1]), flush=True)
            if not killed:
                refuse(status, session)
                return

    def wait_and_kill(self, session: Session, plan: Plan) -> bool:
        """Let the session run to its kill; False if it ended first."""
        while not (session.has_ranks(plan.ranks) if plan.phase == "start-up" else has_stepped(session.log)):
            if session.poll() is not None:
                return False
            time.sleep(0.1)
        start = session.seconds
        while session.seconds < start + plan.wait:
            if session.poll() is not None:
                return False
            time.sleep(0.1)
        if plan.phase == "save" and not wait_for_save(session, plan.delay):
            return False
        ranks = [plan.rank] if plan.victims == ONE_RANK else range(plan.ranks)
        session.kill(ranks, launcher=plan.victims == LAUNCHER)
        return True


def wait_for_save(session: Session, delay: float) -> bool:
    """Wait until ``delay`` seconds after a checkpoint folder has appeared; False if the session ended first."""
    from dora_dist.runs import checkpoint

    newest = checkpoint.checkpoints(session.run)[-1:]
    while checkpoint.checkpoints(session.run)[-1:] == newest:
        if session.poll() is not None:
            return False
        time.sleep(0.005)
    time.sleep(delay)
    return True


def has_stepped(log: Path) -> bool:
    """Whether a session has taken a step."""
    return re.search(r"^step +\d+/", log.read_text(errors="replace"), re.MULTILINE) is not None


def resumed_step(log: Path) -> int:
    """The step that a session went on from, 0 if it began at the start."""
    match = re.search(r"resuming from .*checkpoint-(\d+)", log.read_text(errors="replace"))
    return int(match[1]) if match else 0


def has_unfinished_checkpoint(run: Path) -> bool:
    """Whether a kill has left a folder that a resume must pass over."""
    from dora_dist.runs import checkpoint

    return any(not (folder / checkpoint.MANIFEST).exists() for folder in checkpoint.checkpoints(run))


def memory(session: Session) -> dict[str, float | None]:
    """Memory figures of a session's samples; the samples themselves go into a file beside its log."""
    lines = "".join(json.dumps(asdict(sample)) + "\n" for sample in session.samples)
    session.log.with_suffix(".memory.jsonl").write_text(lines)
    return {"peak_mib": peak(session.samples), "growth_mib_per_1000_steps": growth(session.samples)}


def refuse(status: int | None, session: Session) -> None:
    """Refuse a session that nobody killed and that did not end well."""
    if status != 0:
        text = session.log.read_text(errors="replace")
        raise RuntimeError(f"{session.log.name}: the launcher ended with {status} unasked:\n{text[-5000:]}")


def describe(number: int, session: dict[str, Any]) -> str:
    """One line for a session that is over."""
    kill = session["kill"]
    how = f"killed in {kill['phase']}: {kill['victims']}" if kill else "done"
    return (
        f"session {number}, ranks {session['ranks']}: from step {session['resumed_from_step']} to "
        f"{session['last_step']} in {session['seconds']:.0f} s, {session['steps_taken_again']} steps again, "
        f"peak {session['peak_mib']} MiB; {how}"
    )


def run_soak(soak: Soak, options: argparse.Namespace) -> list[str]:
    """Run the whole soak; returns what failed."""
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "arguments": {name: getattr(options, name) for name in ("minutes", "kill_every", "seed", "ranks")},
        **environment(),
    }
    killed = soak.output / "killed"
    if options.reference is None:
        step = soak.calibrate()
        steps = math.ceil(60 * options.minutes / step)
        save_every = max(5, int(options.kill_every / 6 / step))
        result |= {"seconds_per_step": round(step, 4), "steps": steps, "save_every": save_every}
        print(
            f"{step:.3f} s a step: {steps} steps, a checkpoint every {save_every}; first a run that is left alone",
            flush=True,
        )
        reference = soak.output / "reference"
        result["reference"] = soak.run_whole(reference, steps, save_every)
    else:
        earlier = json.loads((options.reference / "RESULT.json").read_text(encoding="utf-8"))
        steps, save_every, reference = earlier["steps"], earlier["save_every"], options.reference / "reference"
        result |= {name: earlier[name] for name in ("seconds_per_step", "steps", "save_every")}
        result["reference"] = {**earlier["reference"], "commit": earlier["commit"]}
    print(f"left alone: {result['reference']}; now the killed run", flush=True)
    soak.run_killed(killed, steps, save_every)
    result["killed"] = summarize(soak.sessions)
    if soak.is_elastic:
        result["distances"] = distances(reference, killed)
        found = too_far(result["distances"])
    else:
        found = differences(reference, killed)
    failures = judge(result, found, left_over(killed) + left_over(reference))
    result |= {"passed": not failures, "failures": failures, "sessions": soak.sessions}
    (soak.output / "RESULT.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "sessions"}, indent=1), flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kill-every", type=float, default=60, help="seconds, about; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[2],
        choices=[number for number in range(1, GLOBAL_BATCH + 1) if GLOBAL_BATCH % number == 0],
        help="numbers of ranks that sessions of the killed run draw from; the other runs have the first; default: 2",
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--reference", type=Path, help="folder of an earlier soak, whose run that was left alone is used"
    )
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.reference = options.reference and options.reference.resolve()
    options.output.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "dora_dist.quickstart", "--output", ".cache/quickstart", "--prepare-only"],
        cwd=REPOSITORY,
        check=True,
    )
    soak = Soak(options.output, options.kill_every, options.seed, options.ranks)
    try:
        failures = run_soak(soak, options)
    finally:
        soak.end()
    if failures:
        sys.exit("FAILED: " + "; ".join(failures))
    print("passed: the killed run ended like the one that was left alone")


if __name__ == "__main__":
    main()
