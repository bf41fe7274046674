"""Runs that must agree, through the real command: the same losses, gradient norms and masks, step by step.

Tolerances are those of docs/numerics.md: float32 sums in another order, over twelve steps.
"""

import json
from pathlib import Path

import pytest
from support.commands import steps_of, train

RELATIVE = 2e-4

VARIANTS = {
    "one rank": (("--training.per_device_train_batch_size", "8"), 1, "zero2"),
    "one rank, accumulating 4 x 2": (
        ("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "4"),
        1,
        "none",
    ),
    "two ranks, accumulating 2 x 2, with data workers": (
        (
            *("--training.per_device_train_batch_size", "2", "--training.gradient_accumulation_steps", "2"),
            *("--training.dataloader_num_workers", "1"),
        ),
        2,
        "zero2",
    ),
    "ddp": ((), 2, "ddp"),
    "without fused operations": (("--model.fuse", "false"), 2, "zero2"),
    "gradient checkpointing": (("--training.gradient_checkpointing", "true"), 2, "zero2"),
}


def last_evaluation(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "eval_loss" in line][-1]
    return {key: value for key, value in last.items() if key.startswith("eval_")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trajectory_does_not_depend_on_how_it_is_computed(variant, plain_reference, tmp_path):
    overrides, processes, engine = VARIANTS[variant]
    train(plain_reference.config, *overrides, "--output_dir", str(tmp_path / "run"), processes=processes, engine=engine)
    expected, found = steps_of(plain_reference.run), steps_of(tmp_path / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(1, 13))
    for key in ("loss", "grad_norm", "equilibrium_penalty"):
        residuals = [(new[key] - old[key]) / (abs(old[key]) + 1e-9) for new, old in zip(found, expected, strict=True)]
        assert max(map(abs, residuals)) < RELATIVE, (key, residuals)
        # A dropped factor shows in the mean even where every single step is within the tolerance.
        assert abs(sum(residuals) / len(residuals)) < RELATIVE / 2, (key, residuals)
    assert [line["allocation"] for line in found] == [line["allocation"] for line in expected]
    before, after = last_evaluation(plain_reference.run), last_evaluation(tmp_path / "run")
    assert before.keys() == after.keys() >= {"eval_loss", "eval_eval_loss", "eval_eval-small_loss"}
    for key in before:
        assert abs(after[key] - before[key]) <= RELATIVE * abs(before[key]), key
    assert len({line["allocation"] for line in found}) >= 3, "nothing was pruned: the masks prove nothing"
