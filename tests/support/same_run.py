"""The meaning of "the same run": an interrupted run that went on, compared with one that was left alone."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from dora_dist.console.files import read_lines
from dora_dist.runs.checkpoint import checkpoints
from support.commands import steps_of
from support.forked_run import run_to_the_end

RELATIVE = 2e-4
COMPARED = ("loss", "grad_norm", "learning_rate", "equilibrium_penalty", "components", "allocation")


def stopped_at(step: int, finished: Path, folder: Path) -> Path:
    """A run folder inside ``folder``, as it was when the run ``finished`` had come to ``step``."""
    stopped = folder / "run"
    stopped.mkdir()
    shutil.copytree(finished / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
    # The records go on a little further than the checkpoint, as those of a killed run do.
    for name in ("metrics.jsonl", "allocation.jsonl"):
        lines = (finished / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step + 1]
        (stopped / name).write_text("".join(kept) + '{"step": 99, "lo')
    return stopped


def assert_same_run(expected: Path, found: Path) -> None:
    """Adapter, state of the method, optimizer state, training lines, evaluations and events are equal bit for bit."""
    last = checkpoints(expected)[-1].name
    files = ["adapter/adapter_model.safetensors", f"{last}/dynamic_lora.safetensors"]
    files += [str(path.relative_to(expected)) for path in (expected / last).glob("optimizer/rank-*")]
    for name in files:
        old, new = load_file(expected / name), load_file(found / name)
        assert old.keys() == new.keys()
        assert all(old[key].equal(new[key]) for key in old), name
    lines = [[[line[key] for key in COMPARED] for line in steps_of(folder)] for folder in (expected, found)]
    assert lines[0] == lines[1]
    evaluations = [
        [line for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line] for folder in (expected, found)
    ]
    assert evaluations[0] == evaluations[1]
    assert (expected / "allocation.jsonl").read_text() == (found / "allocation.jsonl").read_text()


def evaluation_of(run_folder: Path) -> dict[str, float]:
    """The run's last evaluation."""
    return [line for line in read_lines(run_folder / "metrics.jsonl") if "eval_loss" in line][-1]


def assert_same_course(expected: Path, found: Path, gradient_tolerance: float = RELATIVE, allocations: int = 3) -> None:
    """Check two runs that add up their numbers in another order: the same masks, and losses that differ by rounding
    only.

    Tolerances are those of docs/numerics.md: float32 sums in another order, over twelve steps. The run must have had at
    least ``allocations`` masks; fewer would prove nothing.
    """
    old, new = steps_of(expected), steps_of(found)
    assert [line["step"] for line in new] == [line["step"] for line in old]
    for key in ("loss", "grad_norm", "equilibrium_penalty"):
        tolerance = gradient_tolerance if key == "grad_norm" else RELATIVE
        residuals = [(b[key] - a[key]) / (abs(a[key]) + 1e-9) for a, b in zip(old, new, strict=True)]
        assert max(map(abs, residuals)) < tolerance, (key, residuals)
        # A dropped factor shows in the mean even where every single step is within the tolerance.
        assert abs(sum(residuals) / len(residuals)) < tolerance / 2, (key, residuals)
    for key in ("allocation", "learning_rate", "components"):
        assert [line[key] for line in new] == [line[key] for line in old], key
    assert len({line["allocation"] for line in new}) >= allocations, "the masks prove nothing"
    events = [read_lines(folder / "allocation.jsonl") for folder in (expected, found)]
    assert [event["kept"] for event in events[0]] == [event["kept"] for event in events[1]]
    before, after = evaluation_of(expected), evaluation_of(found)
    assert before.keys() == after.keys()
    for key in before:
        if key.endswith("loss"):
            assert abs(after[key] - before[key]) <= RELATIVE * abs(before[key]), key


def assert_invariant(config: Path, folder: Path, exact: tuple[str, ...]) -> None:
    """Two ranks, one rank, and one that accumulates take the same course; metrics in ``exact`` are equal at its end."""
    runs = []
    for ranks, rows, accumulation in ((2, 4, 1), (1, 8, 1), (1, 2, 4)):
        runs.append(folder / f"run-{rows}")
        options = ("--training.per_device_train_batch_size", str(rows))
        options += ("--training.gradient_accumulation_steps", str(accumulation))
        run_to_the_end(config, runs[-1], folder / f"log-{rows}", *options, ranks=ranks)
    for other in runs[1:]:
        assert_same_course(runs[0], other, gradient_tolerance=10 * RELATIVE)
        for name in exact:
            assert evaluation_of(other)[f"eval_{name}"] == evaluation_of(runs[0])[f"eval_{name}"], name
