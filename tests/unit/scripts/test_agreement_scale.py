"""The model of what agreement costs, by hand and against the real thing."""

import pytest
import scale_model
import torch.distributed as dist
from scale_model import (
    Files,
    Network,
    Rank,
    Shape,
    base_seconds,
    checkpoint_seconds,
    event_bytes,
    event_seconds,
    resume_seconds,
)
from support.tiny_models import adapt, tiny_model, trainable

TINY = Shape("tiny", blocks=2, hidden=64, intermediate=128, key_value=32, vocabulary=96)
RING = Network("ring", latency=1, bandwidth=10)
TREE = Network("tree", latency=1, bandwidth=10, tree=True)


def test_sizes_are_those_of_a_real_model():
    base = tiny_model()
    norms = sum(parameter.numel() for name, parameter in base.named_parameters() if "norm" in name)
    assert sum(parameter.numel() for parameter in base.parameters()) - norms == TINY.base_numel
    model = adapt(base, initial_rank=3)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == TINY.adapter_numel(3)
    assert len(model.adapted_layers()) == TINY.layers


@pytest.mark.parametrize(("value", "name"), [(None, "failure"), (bytes(32), "digest")])
def test_objects_travel_in_the_bytes_that_torch_makes_of_them(value, name):
    _, size = dist.distributed_c10d._object_to_tensor(value, "cpu", None)
    assert int(size) == scale_model.OBJECT_BYTES[name]


def test_collectives_by_hand():
    assert RING.gather(4, 20) == 3 * (1 + 2)
    assert RING.reduce(4, 40) == 6 * 1 + 2 * 3 / 4 * 40 / 10
    assert TREE.reduce(4, 40) == 2 * 2 * 1 + 2 * 40 / 10
    # On shared cores, every message of every rank counts: two halves of a block, two segments a rank.
    shared = Network("shared", 1, 10, launch=5, shared=True)
    assert shared.gather(4, 20) == 5 + 4 * 3 * 2 + 4 * 3 * 20 / 10
    assert shared.reduce(4, 40) == 5 + 8 * 6 + 6 * 40 / 10
    assert shared.reduce(4, 4) == 5 + 1 * 6 + 6 * 4 / 10
    assert RING.reduce(1, 40) == RING.gather(1, 20) == 0


RANK = Rank(
    hash_rate=100,
    copy_rate=200,
    sync=0.5,
    object_fixed=3,
    object_per_rank=0.25,
    select_per_component=0.125,
    apply_per_layer=2,
)


def test_an_event_by_hand():
    parts = event_seconds(TINY, 3, 4, 2, RING, RANK)
    nbytes, layers = TINY.adapter_numel(3) * 4, 14
    assert parts == {
        "gather of failures": pytest.approx((1 + 0.8) + (1 + 0.4) + 3 + 0.5),
        "copy to host": nbytes / 200 + 4 * layers * 0.5,
        "hash": nbytes / 100,
        "gather of digests": pytest.approx((1 + 0.8) + (1 + 4.7) + 3 + 0.5),
        "mean of scores": pytest.approx(2 * 1 + 1 * 8 * 3 * layers / 10),
        "selection": 3 * layers * 0.125 + layers * (2 + 6 * 0.5),
    }
    assert event_bytes(TINY, 3, 2) == (8 + 4) + (8 + 47) + 8 * 3 * layers


def test_a_checkpoint_by_hand():
    event = event_seconds(TINY, 3, 4, 2, RING, RANK)
    adapter = TINY.adapter_numel(3) * 4 + 3 * 14 * (1 + 8)
    assert checkpoint_seconds(TINY, 3, 4, 2, RING, RANK) == {
        "digests compared": pytest.approx(sum(event[part] for part in ("copy to host", "hash", "gather of digests"))),
        "phases left together": 4 * event["gather of failures"],
        "manifest by rank 0": (2 * adapter + 12 * TINY.adapter_numel(3)) / 100,
    }


def test_reading_by_hand():
    files = Files(base=1000, adapter=100, optimizer=1200)
    # Rank 0 checks 1300 bytes alone; then four ranks read 100 + 300 bytes each through 100 bytes a second.
    assert resume_seconds(files, 4, shared_rate=100, client_rate=50, hash_rate=130) == {
        "manifest check by rank 0": 1300 / 50 + 1300 / 130,
        "adapter and optimizer parts": 4 * 400 / 100,
    }
    assert base_seconds(files, 1, shared_rate=100, client_rate=50) == 20
    assert base_seconds(files, 4, shared_rate=100, client_rate=50) == 40
