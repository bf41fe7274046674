"""Parts of the entry point that need no run."""

import pytest
import torch
from tiny_models import adapt, shake, tiny_model
from tiny_run import tiny_tokenizer

from dora_dist.records import RUN, SUMMARY, write_json
from dora_dist.train import is_same_finished_run, save_adapter


def finished_run(folder, **settings):
    write_json(folder / RUN, {"settings": settings})
    write_json(folder / SUMMARY, {})
    return folder


def test_a_finished_run_is_known_by_its_settings(tmp_path):
    assert not is_same_finished_run(tmp_path, {"seed": 1})
    run = finished_run(tmp_path, seed=1, targets=["q_proj"])
    assert is_same_finished_run(run, {"seed": 1, "targets": ("q_proj",)})


def test_a_finished_run_is_not_taken_for_the_result_of_other_settings(tmp_path):
    run = finished_run(tmp_path, seed=1, steps=10)
    with pytest.raises(ValueError, match=r"seed was 1 and is now 2; steps was 10 and is now 20\. Restore them"):
        is_same_finished_run(run, {"seed": 2, "steps": 20})


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
