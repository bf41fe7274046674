"""The doctor on GPUs, with one rank for each."""

import pytest
import torch
from support.commands import ZERO2_GPU, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_gpu_computes_and_reduces(tmp_path):
    gpus = torch.cuda.device_count()
    finished = run(
        *(*ZERO2_GPU, "--num_processes", str(gpus)),
        *("-m", "dora_dist.doctor", "--output", str(tmp_path / "run")),
        DS_ACCELERATOR="",
        CUDA_VISIBLE_DEVICES="",
        timeout=180,
    )
    assert "nf4 layer: right" in finished.output
    assert f"All-reduce over {gpus} rank" in finished.output
    assert "the sum of known values is right" in finished.output
    assert finished.status == (0 if "nothing wrong found\n" in finished.output else 1)
