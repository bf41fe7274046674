"""What "the same run" means: an interrupted run that went on, against one that was left alone."""

import json
import shutil
from pathlib import Path

from commands import steps_of
from safetensors.torch import load_file

from dora_dist.checkpoint import checkpoints
from dora_dist.records import read_lines

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
