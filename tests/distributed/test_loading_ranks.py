"""Two ranks load a base at the same time: each takes what it takes once quantized and one file, not its 16 bits."""

import pytest
from many_shards import save_many_shards, size_of_shards
from safetensors.torch import load_file, save_file
from support import rank_functions
from support.ranks import run_ranks
from support.tiny_run import save_tiny_model

MB = 10**6
SLACK = 1.2

FULL = pytest.mark.full("memory")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """257 MB in 16 bits."""
    folder = save_many_shards(tmp_path_factory.mktemp("model"), hidden=1024, layers=10, shard_bytes=40 * MB)
    assert len(size_of_shards(folder)) > 5
    return folder


def load(tiny, model, quantization, dtype="float32", hoard=False):
    outcomes = run_ranks(rank_functions.load_and_watch, 2, tiny, str(model), quantization, dtype, hoard, timeout=120)
    assert all(outcome.error is None for outcome in outcomes), [outcome.error for outcome in outcomes]
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("nf4", "float32"), pytest.param("nf4", "bfloat16", marks=FULL), pytest.param("int8", "float32", marks=FULL)],
)
def test_the_peak_is_the_quantized_base_and_one_file(quantization, dtype, tiny, model):
    shards = size_of_shards(model)
    for rank in load(tiny, model, quantization, dtype):
        assert rank["model"] < 0.6 * sum(shards)
        # Pages of mapped files count too.
        assert rank["resident"] <= SLACK * (rank["model"] + max(shards))
        assert rank["own"] <= SLACK * (rank["model"] + max(shards))
        # Nothing of the way there is left.
        assert rank["kept"] <= rank["model"] + 10 * MB


@FULL
def test_a_loader_that_holds_all_16_bits_would_be_noticed(tiny, model):
    shards = size_of_shards(model)
    for rank in load(tiny, model, "nf4", hoard=True):
        assert rank["own"] > SLACK * (rank["model"] + max(shards)) + 50 * MB
        assert rank["resident"] >= rank["own"] - 10 * MB


def test_a_base_that_is_used_as_it_is_stored_is_shared_by_the_ranks(tiny, model):
    for rank in load(tiny, model, "none", "bfloat16"):
        assert rank["model"] > 150 * MB
        assert rank["own"] < 20 * MB


def test_a_base_that_is_not_all_there_on_one_rank_ends_all(tiny, tmp_path):
    broken = save_tiny_model(tmp_path)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for outcome in run_ranks(rank_functions.load_where_one_is_broken, 2, tiny, str(broken)):
        assert outcome.error_type == "RankFailedError"
        assert "rank 1" in outcome.error
        assert "has no weights for model.norm.weight" in outcome.error
