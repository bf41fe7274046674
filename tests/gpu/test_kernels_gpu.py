"""Liger's kernels on a GPU, in the dtypes in which runs compute there."""

import copy

import pytest
import torch
from support.same_gradients import assert_same_gradients, relative_error
from support.tiny_models import adapt, loss_and_gradients, shake, tiny_model, tokens

from dora_dist.base_model.kernels import KERNELS, use_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_loss_and_gradients_are_those_of_the_models_own_code(
    architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install 'dora-dist[gpu]'")
    base = tiny_model(architecture).to("cuda", dtype)
    plain = shake(adapt(copy.deepcopy(base), fuse=False)).train()
    model = shake(adapt(base, kernels=use_kernels(base))).train()
    assert model.kernels.names == KERNELS
    (found_loss, found), (loss, gradients) = (loss_and_gradients(each, tokens().cuda()) for each in (model, plain))
    assert relative_error(found_loss, loss) <= tolerance
    assert_same_gradients(found, gradients, tolerance)
