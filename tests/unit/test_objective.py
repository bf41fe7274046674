from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import tiny_classifier

from dora_dist.objective import class_losses, squared_errors


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_their_mean_is_the_models_own_loss(architecture, dtype):
    ids = torch.arange(24).reshape(3, 8) + 5
    for num_labels, losses, labels in (
        (3, class_losses, torch.tensor([2, 0, 1])),
        (1, squared_errors, torch.tensor([0.5, -2.0, 3.25], dtype=dtype)),
    ):
        model = tiny_classifier(architecture, num_labels=num_labels).to(dtype)
        own = model(input_ids=ids, labels=labels).loss
        found = losses(model(input_ids=ids), labels)
        assert found.shape == (3,)
        assert found.dtype == dtype
        torch.testing.assert_close(found.mean(), own)


def test_low_precision_logits_are_not_summed_in_low_precision():
    logits = torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16)
    found = class_losses(SimpleNamespace(logits=logits), torch.tensor([0]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.log1p(torch.exp(torch.tensor([-2.0]))))
