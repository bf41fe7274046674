"""The entry point on GPUs, bfloat16 under ZeRO-2."""

import json

import pytest
import torch
from support.commands import ZERO2_GPU, run
from support.tiny_run import write_config

from dora_dist.method.importance import component_scores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_scores_are_the_same_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((12, 4096), (12,), (11008, 12))]
    expected = component_scores(*tensors)
    found = component_scores(*(tensor.cuda() for tensor in tensors))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=0)


def test_a_run_on_all_gpus_meets_its_budget_and_resumes(tmp_path):
    config = write_config(tmp_path, distributed={"engine": "zero2"}, training={"per_device_train_batch_size": 1})
    more = ("--num_processes", str(torch.cuda.device_count()), "-m", "dora_dist.train", "--config", str(config))
    finished = run(*ZERO2_GPU, *more, DS_ACCELERATOR="", CUDA_VISIBLE_DEVICES="")
    assert finished.status == 0, finished.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["components_kept"] == 2 * len(summary["ranks"])
    (tmp_path / "run" / "summary.json").unlink()
    finished = run(*ZERO2_GPU, *more, DS_ACCELERATOR="", CUDA_VISIBLE_DEVICES="")
    assert finished.status == 0, finished.output
    assert "resuming from" in finished.output
