"""The entry point on GPUs, bfloat16 under ZeRO-2."""

import json

import pytest
import torch
from support.commands import ZERO2_GPU, run
from support.faulty_rank import want_more_memory_than_allowed
from support.tiny_run import write_config

from dora_dist.base_model.recomputation import Recomputation
from dora_dist.distributed.out_of_memory import NoMemoryLeftError, explained
from dora_dist.method.importance import component_scores
from dora_dist.training.out_of_memory import step_advice

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


def test_recomputing_as_few_layers_as_fit_needs_none_for_a_tiny_model(tmp_path):
    config = write_config(tmp_path, model={"recompute_layers": "auto"}, distributed={"engine": "none"})
    finished = run(
        *("python", "-m", "dora_dist.train", "--config", str(config)),
        DS_ACCELERATOR="",
        CUDA_VISIBLE_DEVICES="0",
    )
    assert finished.status == 0, finished.output
    assert "recomputes the activations of 0 of 2 layers" in finished.output


def test_memory_that_runs_out_is_one_message_with_the_next_setting():
    try:
        with (
            pytest.raises(
                NoMemoryLeftError, match=r"model\.recompute_layers 20, then all.*OutOfMemoryError: CUDA out of"
            ),
            explained(lambda: step_advice(5, Recomputation(12, 32), 4, 2)),
        ):
            want_more_memory_than_allowed()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
