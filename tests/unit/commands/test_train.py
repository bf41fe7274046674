"""Parts of the entry point that need no run."""

import re

import pytest
import torch
from support.repository import REPOSITORY
from support.tiny_models import adapt, shake, tiny_model

from dora_dist.config.parse import load_config
from dora_dist.setup.adapter_use import describe_size
from dora_dist.train import start, world_size_of_a_run

COMPONENT_KIB = 2 * (128 + 96 + 96 + 128 + 192 + 192 + 192) * 4 / 1024
"""Of one component of each layer of the tiny model, in float32."""


def test_the_size_of_the_adapter_is_said_with_and_without_padding(tmp_path):
    shake(adapt(tiny_model())).save_pretrained(tmp_path / "adapter")
    line = describe_size(tmp_path, "causal_lm")
    padded, compact = (float(size) for size in re.findall(r"([0-9.]+) KiB", line))
    assert padded - compact == pytest.approx(COMPONENT_KIB * (8 - 3), abs=0.2)
    assert f"dora-dist export {tmp_path} --format compact" in line
    assert "export" not in describe_size(tmp_path, "sequence_classification")


@pytest.mark.parametrize(("engine", "gpus", "ranks"), [("zero2", 0, 2), ("ddp", 8, 8), ("none", 8, 1)])
def test_a_dry_run_is_for_the_ranks_that_a_run_would_have_here(engine, gpus, ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", ["--distributed.engine", engine])
    assert world_size_of_a_run(config) == ranks


def test_a_process_that_is_one_of_several_by_half_starts_no_ranks_of_its_own(monkeypatch):
    """Of every task of a job that was started so, there would be a run."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is 1 and WORLD_SIZE is 2, but LOCAL_RANK is not set"):
        start([str(REPOSITORY / "configs" / "quickstart.yaml")])
