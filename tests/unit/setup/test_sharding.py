"""What ``distributed.shard_base`` is refused with before any weight is read."""

import pytest
import torch
from support.resolved_run import load, resolved
from support.tiny_run import write_config

from dora_dist.base_model import load as base
from dora_dist.setup.sharding import check_sharding

SHARDED = ("--distributed.engine", "ddp", "--distributed.shard_base", "true")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("run"))


def skeleton(settings):
    return base.load_skeleton(base.BaseModelSpec.of(settings.model, settings.task))


def test_a_torch_that_makes_gathered_codes_require_a_gradient_is_refused(config):
    settings = load(config, *SHARDED)
    with pytest.raises(
        ValueError, match=r"shard_base is true, which needs torch 2.12 or newer, but this is torch 2.11"
    ):
        check_sharding(settings, skeleton(settings), "2.11.0+cu128")
    check_sharding(settings, skeleton(settings), "2.12.0")
    check_sharding(load(config), skeleton(settings), "2.11.0")


def test_a_model_without_layers_of_its_own_is_refused(config):
    settings, model = load(config, *SHARDED), skeleton(load(config, *SHARDED))
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="has no layers that can be gathered one by one"):
        check_sharding(settings, model, "2.13.0")


def test_prompt_routing_is_refused(config):
    options = ("--adapter.routing", "prompt", "--pruning.rule", "none", "--adapter.initial_rank", "2")
    with pytest.raises(ValueError, match=r"shard_base is true, but adapter.routing is prompt"):
        load(config, *SHARDED, *options)


def test_a_resumed_run_may_change_it(config, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.0")  # the oldest torch that runs here is too old for shards
    whole, sharded = load(config, *SHARDED[:2]), load(config, *SHARDED)
    assert not resolved(whole).fingerprint.differences(resolved(sharded).fingerprint)
