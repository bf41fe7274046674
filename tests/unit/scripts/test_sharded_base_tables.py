"""A base in shards on paper, against arithmetic by hand for the shape of 8B."""

import pytest
import sharded_base

from dora_dist.base_model.load import BaseModelSpec, load_skeleton
from dora_dist.base_model.shape import read_shape

LAYER = (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) // 2
"""Bytes of its codes: q and o, k and v, and the MLP."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sharded_base.save_shape(tmp_path_factory.mktemp("shapes"), "8B")


def test_what_is_gathered(model):
    shape = read_shape(load_skeleton(BaseModelSpec(path=str(model))), {})
    assert sharded_base.layer_bytes(shape) == LAYER == 109_051_904
    cost = sharded_base.Gathered.of(shape, 8)
    assert cost.nbytes == 2 * 32 * LAYER * 7 / 8
    assert cost.nvlink == cost.nbytes / 450e9
    assert cost.network == cost.nbytes / 50e9
    assert cost.computing == 6 * (32 * 2 * LAYER + 128256 * 4096) * 8192 / 200e12
    assert sharded_base.Gathered.of(shape, 1).nbytes == 0


def test_what_estimate_says_of_8_gpus(model):
    parts = sharded_base.estimate(model, 8).configured.resident
    assert parts["4-bit weights, in 8 shards"] == 32 * LAYER // 8
    assert parts["gathered layers"] == 3 * LAYER
    assert parts["embeddings and head"] == 2 * 2 * 128256 * 4096
    blocks = 32 * 2 * LAYER // 64
    tables = 32 * 7 * 4 * (16 + 256 + 1)
    assert parts["quantization constants"] == blocks + 4 * blocks // 256 + tables


def test_the_number_of_tokens_enters_what_is_kept_and_not_what_stays(model):
    short, long = (sharded_base.estimate(model, 8, "--data.max_length", str(n)) for n in (1024, 32768))
    assert long.tokens_per_micro_batch == 32 * short.tokens_per_micro_batch == 32768
    assert long.configured.resident == short.configured.resident
    # All layers are recomputed, and each keeps its input in bfloat16.
    assert long.configured.activations == 32 * short.configured.activations == 32 * 32768 * 4096 * 2
