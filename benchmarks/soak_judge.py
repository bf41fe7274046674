"""Compares two runs on disk, reads samples of memory, and decides whether a soak has passed."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from soak_session import REPOSITORY, Sample

from dora_dist.config.format_version import METHOD_STATE

MIB = 2**20
FEWEST_STEPS = 1000
"""Smallest number of steps that a slope is drawn through: an evaluation moves memory by 10 or 20 MiB up and down."""
MOST_GROWTH = 2.0
"""Growth in MiB per 1000 steps of one session that counts as none. transformers keeps every logged step in memory, and
the soak logs every step, which alone is about 1 MiB per 1000 steps."""
MOST_DRIFT = 0.05
"""Largest share by which the peaks of late sessions may lie above those of early ones."""
MOST_APART = 0.01
"""Largest share by which the held-out losses of an elastic soak may differ. The first steps differ by 1e-7 or so, which
grows with the trajectory (docs/numerics.md)."""
SESSION_LINES = {"session_seconds", "train_runtime"}
"""Keys of lines that describe a session instead of a step."""
TIMES = ("seconds_per_step", "eval_seconds", "eval_runtime")
"""Measured times, which no two runs share."""


def differences(reference: Path, killed: Path) -> list[str]:
    """What differs between two finished runs; empty if nothing does.

    Compared bit for bit: every tensor of the adapter and of the last checkpoint, all training and evaluation lines
    but for times, and the pruning events.
    """
    from dora_dist.runs import checkpoint

    last = [checkpoint.checkpoints(run)[-1].name for run in (reference, killed)]
    if last[0] != last[1]:
        return [f"the last checkpoint is {last[1]} instead of {last[0]}"]
    found = []
    for folder in ("adapter", last[0]):
        found += _tensor_differences(reference / folder, killed / folder)
    found += _metric_differences(reference, killed)
    if (reference / "allocation.jsonl").read_bytes() != (killed / "allocation.jsonl").read_bytes():
        found.append("allocation.jsonl differs")
    state = [(run / last[0] / METHOD_STATE).read_bytes() for run in (reference, killed)]
    if state[0] != state[1]:
        found.append(f"{METHOD_STATE} of {last[0]} differs")
    return found


def distances(reference: Path, killed: Path) -> dict[str, Any]:
    """The distance between two finished runs that had other numbers of ranks.

    Keys: ``last_checkpoint`` of both; ``events_equal``, whether they kept the same components in the same steps;
    ``steps_equal``, whether both have a line for each of the same steps; ``loss``, the mean and the largest relative
    difference of a step's training loss; ``held_out_loss``, by step, of the first run, of the second, and their
    relative difference.
    """
    from dora_dist.runs import checkpoint

    runs = (reference, killed)
    losses, held_out = [[_by_step(run, key) for run in runs] for key in ("loss", "eval_loss")]
    apart = [abs(losses[1][step] / loss - 1) for step, loss in losses[0].items() if step in losses[1]]
    return {
        "last_checkpoint": [checkpoint.checkpoints(run)[-1].name for run in runs],
        "events_equal": _kept(reference) == _kept(killed),
        "steps_equal": all(first.keys() == second.keys() for first, second in (losses, held_out)),
        "loss": {"mean": float(np.mean(apart)), "largest": float(np.max(apart))},
        "held_out_loss": [
            {"step": step, "left_alone": loss, "killed": held_out[1][step], "apart": abs(held_out[1][step] / loss - 1)}
            for step, loss in held_out[0].items()
            if step in held_out[1]
        ],
    }


def _kept(run: Path) -> list[tuple[int, Mapping[str, list[int]]]]:
    from dora_dist.runs.records import read_events

    return [(event.step, event.kept) for event in read_events(run / "allocation.jsonl")]


def _by_step(run: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in comparable_lines(run) if key in line}


def too_far(apart: Mapping[str, Any]) -> list[str]:
    """The figures of :func:`distances` that are too large for runs that differ in their numbers of ranks only."""
    found = []
    if len(set(apart["last_checkpoint"])) > 1:
        found.append("the last checkpoint is {1} instead of {0}".format(*apart["last_checkpoint"]))
    if not apart["steps_equal"]:
        found.append("the runs do not have lines of the same steps")
    far = [line for line in apart["held_out_loss"] if line["apart"] > MOST_APART]
    if far:
        found.append(f"held-out losses differ by more than {MOST_APART:.0%} at {len(far)} steps, first {far[0]}")
    return found


def _tensor_differences(reference: Path, killed: Path) -> list[str]:
    from safetensors.torch import load_file

    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")} for folder in (reference, killed)
    ]
    if files[0] != files[1] or not files[0]:
        return [f"{reference.name} holds {sorted(files[0])} and {sorted(files[1])}"]
    found = []
    for name in sorted(files[0]):
        expected, tensors = load_file(reference / name), load_file(killed / name)
        if expected.keys() != tensors.keys() or not all(expected[key].equal(tensors[key]) for key in expected):
            found.append(f"{reference.name}/{name} differs")
    return found


def comparable_lines(run: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` without times, and without those that sum one session up, which differ by design:
    the Trainer's last line (its ``train_loss`` is of the steps since the resume) and the session's own."""
    from dora_dist.console.files import read_lines

    lines = [line for line in read_lines(run / "metrics.jsonl") if not SESSION_LINES & line.keys()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _metric_differences(reference: Path, killed: Path) -> list[str]:
    expected, found = comparable_lines(reference), comparable_lines(killed)
    if len(expected) != len(found):
        return [f"metrics.jsonl has {len(found)} comparable lines instead of {len(expected)}"]
    wrong = [(a, b) for a, b in zip(expected, found, strict=True) if a != b]
    return [f"metrics.jsonl: {len(wrong)} lines differ, first {wrong[0][1]} instead of {wrong[0][0]}"] if wrong else []


def growth(samples: Sequence[Sample]) -> float | None:
    """MiB per 1000 steps that a rank gained in the second half of a session; None where the session was too short.

    This is the slope of a line through the samples (least squares), the largest of all ranks. In the first half, memory
    still settles: the first evaluation, the first checkpoint, the allocator's arenas. After the last step, results are
    written and pictures drawn, which is not training.
    """
    slopes = []
    for rank in {sample.rank for sample in samples}:
        mine = [sample for sample in samples if sample.rank == rank]
        first, last = mine[0].step, mine[-1].step
        settled = [sample for sample in mine if (first + last) / 2 <= sample.step < last]
        if settled and settled[-1].step - settled[0].step >= FEWEST_STEPS:
            slopes.append(1000 * np.polyfit([s.step for s in settled], [s.rss / MIB for s in settled], 1)[0])
    return round(float(max(slopes)), 3) if slopes else None


def peak(samples: Sequence[Sample]) -> float | None:
    """The largest memory that any rank had in a session, in MiB."""
    return round(max(sample.rss for sample in samples) / MIB, 1) if samples else None


def drift(peaks: Sequence[float]) -> float | None:
    """Share by which the median peak of the last third of the sessions lies above that of the first third."""
    third = len(peaks) // 3
    if not third:
        return None
    return round(float(np.median(peaks[-third:]) / np.median(peaks[:third]) - 1), 4)


def environment() -> dict[str, Any]:
    """The environment that the result depends on, besides the arguments."""
    from dora_dist.console.provenance import versions

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def summarize(sessions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers over all sessions of the killed run; the drift of memory over those with the most ranks."""
    most = max(session["ranks"] for session in sessions)
    kills = [session for session in sessions if session["kill"]]
    counted = {
        f"{field}: {value}": sum(session["kill"][field] == value for session in kills)
        for field in ("ranks", "phase", "victims")
        for value in sorted({session["kill"][field] for session in kills})
    }
    return {
        "sessions": len(sessions),
        "kills": len(kills),
        "kills_by_kind": counted,
        "resumes": sum(session["resumed_from_step"] > 0 for session in sessions),
        "unfinished_checkpoints_left": sum(session["unfinished_checkpoint_left"] for session in sessions),
        "steps_taken_again": sum(session["steps_taken_again"] for session in sessions),
        "minutes": round(sum(session["seconds"] for session in sessions) / 60, 2),
        "peaks_drift": drift(
            [session["peak_mib"] for session in sessions if session["stepped"] and session["ranks"] == most]
        ),
    }


def judge(result: dict[str, Any], found: Sequence[str], leftovers: Sequence[int]) -> list[str]:
    """Everything that makes the soak a failure; empty if it passed."""
    killed, reference = result["killed"], result["reference"]
    failures = list(found)
    if killed["kills"] == 0:
        failures.append("nothing was killed")
    if killed["minutes"] < result["arguments"]["minutes"]:
        failures.append(f"the killed run took {killed['minutes']} minutes only")
    if (reference["growth_mib_per_1000_steps"] or 0) > MOST_GROWTH:
        failures.append(f"memory grows by {reference['growth_mib_per_1000_steps']} MiB per 1000 steps")
    if (killed["peaks_drift"] or 0) > MOST_DRIFT:
        failures.append(f"the peaks of late sessions lie {killed['peaks_drift']:.1%} above those of early ones")
    if leftovers:
        failures.append(f"{len(leftovers)} processes are left")
    return failures
