"""``adapter.start_from`` in a run: the folder is read once, and not needed where a run goes on from a checkpoint."""

import pytest
import torch
from support.resolved_run import load
from support.tiny_models import adapt, load_base, shake
from support.tiny_run import tiny_tokenizer

from dora_dist.setup import build, resolve, run_data


def decided(settings, started_from=None):
    return resolve.resolve_run(settings, *run_data.read_data(settings), started_from=started_from)


@pytest.fixture
def adapter(config, tmp_path):
    """The folder of an adapter with ranks of 2."""
    model = shake(adapt(load_base(config.parent / "model", "none"), initial_rank=2))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_model_starts_with_what_was_read_when_the_run_was_decided(config, adapter):
    settings = load(config, "--adapter.start_from", str(adapter))
    start = decided(settings).start_adapter
    adapter.rename(adapter.with_name("moved"))
    model = build.load_model(settings, torch.device("cpu"), tiny_tokenizer(), start_adapter=start)
    for name, layer in model.adapted_layers().items():
        torch.testing.assert_close(layer.lora_a[:2].float(), start.layers[name].lora_a)


def test_a_run_that_goes_on_compares_the_folder_where_it_is_still_there(config, adapter):
    settings = load(config, "--adapter.start_from", str(adapter))
    first = decided(settings)
    began_with = first.fingerprint.adapter["start_from"]
    again = decided(settings, began_with)
    assert again.fingerprint == first.fingerprint
    assert again.start_adapter is None, "the checkpoint has its components"

    adapter.rename(adapter.with_name("moved"))
    without = decided(settings, began_with)
    assert without.fingerprint == first.fingerprint
    assert any("is not there any more: the run has what it began with" in note for note in without.data.notes)
    with pytest.raises(ValueError, match=r"adapter\.start_from is .*, which has no adapter_config.json"):
        decided(settings)

    shake(adapt(load_base(config.parent / "model", "none"), initial_rank=2), seed=7).save_pretrained(adapter)
    (difference,) = first.fingerprint.differences(decided(settings, began_with).fingerprint)
    assert difference.startswith("adapter.start_from was '")
    (difference,) = first.fingerprint.differences(decided(load(config), began_with).fingerprint)
    assert difference.endswith("and is now None")
