"""Parts of the entry point that need no run."""

import torch
from support.tiny_models import adapt, shake, tiny_model
from support.tiny_run import tiny_tokenizer

from dora_dist.train import save_adapter


def test_an_adapter_is_replaced_as_a_whole(tmp_path):
    model = shake(adapt(tiny_model()))
    save_adapter(model, tiny_tokenizer(), tmp_path / "adapter")
    (tmp_path / "adapter" / "stray").touch()
    for layer in model.adapted_layers().values():
        layer.component_mask[1:] = False
    save_adapter(model, tiny_tokenizer(), tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert not (tmp_path / "adapter" / "stray").exists()
    assert {factors[0].shape[0] for factors in model.folded_factors().values()} == {1}
    assert torch.isfinite(next(iter(model.folded_factors().values()))[1]).all()
