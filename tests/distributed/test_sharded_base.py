"""A base in shards on real ranks: the numbers of a whole one, bit for bit, and never more of it than a shard and a
layer."""

import json
import os
import subprocess
import sys

import pytest
import torch
from many_shards import save_many_shards, size_of_shards
from support import shard_functions
from support.ranks import run_ranks
from support.repository import REPOSITORY
from support.tiny_encoders import save_tiny_summarizer
from support.tiny_models import VOCABULARY, tiny_model
from support.tiny_run import save_tiny_model

from dora_dist.base_model.kernels import KERNELS, RMS_NORM, SWIGLU

MB = 10**6
SLACK = 1.2
FULL = pytest.mark.full("ranks")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def values(function, ranks, *args):
    outcomes = run_ranks(function, ranks, *args, timeout=120)
    assert all(outcome.error is None for outcome in outcomes), [outcome.error for outcome in outcomes]
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize(
    ("ranks", "quantization", "recomputed"),
    [
        (2, "nf4", 0),
        pytest.param(2, "nf4", 2, marks=FULL),
        pytest.param(2, "none", 1, marks=FULL),
        pytest.param(4, "nf4", 0, marks=FULL),
        pytest.param(4, "nf4", 1, marks=FULL),
        (1, "nf4", 1),
    ],
)
def test_losses_gradients_and_adapter_are_those_of_a_whole_base(ranks, quantization, recomputed, tiny):
    for rank in values(shard_functions.train_both, ranks, tiny, quantization, recomputed):
        assert len(rank["found"]) == len(rank["expected"]) > 100
        assert all(ours.equal(theirs) for ours, theirs in zip(rank["found"], rank["expected"], strict=True))
        held, there = rank["before"]
        assert held * ranks == there
        assert rank["after"] == rank["before"]


def test_a_base_in_shards_trains_with_the_kernels_that_need_no_layer_to_be_tried(tiny):
    """A trial that ran a layer would have let it take itself for a model of its own."""
    for rank in values(shard_functions.train_with_kernels, 2, tiny):
        (of_whole, expected), (of_shards, found) = rank["expected"], rank["found"]
        assert (set(of_whole), set(of_shards)) == (set(KERNELS), {RMS_NORM, SWIGLU})
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@FULL
@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_a_decoder_adds_up_the_gradient_of_its_encoder_layer_by_layer_and_else_nothing_differs(architecture, tmp_path):
    """The encoder's output goes into every decoder layer, and FSDP changes in what order its gradients are added."""
    save_tiny_summarizer(tmp_path, architecture, vocab_size=VOCABULARY)
    for rank in values(shard_functions.train_summarizers, 2, str(tmp_path)):
        shards, same_order, whole = rank["shards"], rank["whole, layer by layer"], rank["whole"]
        assert len(shards) == len(same_order) > 100
        assert all(ours.equal(theirs) for ours, theirs in zip(shards, same_order, strict=True))
        of_first_step = list(zip(shards, whole, strict=True))[: len(whole) // (shard_functions.STEPS + 1)]
        assert of_first_step[0][0].equal(of_first_step[0][1]), "the loss"
        for ours, theirs in of_first_step:
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@FULL
def test_each_node_has_a_whole_base_in_shards_over_its_ranks(tiny):
    for rank in values(shard_functions.train_both, 4, tiny, "nf4", 1, "node", 2):
        assert all(ours.equal(theirs) for ours, theirs in zip(rank["found"], rank["expected"], strict=True))
        held, there = rank["before"]
        assert held * 2 == there


def test_nodes_with_different_numbers_of_ranks_are_refused():
    for outcome in run_ranks(shard_functions.share_out_over_odd_nodes, 3):
        assert outcome.error_type == "ExpectedRunError"
        assert "the nodes have 2, 2, 1," in outcome.error


def test_ranks_run_the_model_as_often_as_each_of_them_likes(tiny):
    for number, rank in enumerate(values(shard_functions.run_unevenly, 3, tiny, None)):
        assert len(rank["found"]) == number
        assert all(ours.equal(theirs) for ours, theirs in zip(rank["found"], rank["expected"], strict=True))
        held, there = rank["held"]
        assert held < 0.4 * there


def test_a_rank_that_fails_in_a_forward_of_its_own_is_named_by_all(tiny):
    for outcome in run_ranks(shard_functions.run_unevenly, 3, tiny, 1):
        assert outcome.error_type == "RankFailedError"
        assert "rank 1" in outcome.error
        assert "something of this rank's own" in outcome.error


def test_a_rank_that_fails_where_all_run_the_model_waits_for_nobody(tiny):
    error = run_ranks(shard_functions.fail_with_gradients, 1, tiny, 0)[0]
    assert (error.error_type, error.error) == ("RuntimeError", "something of this rank's own")


def test_the_whole_weight_of_a_layer_is_there_where_all_ranks_ask_for_it(tiny):
    for same in values(shard_functions.weights_one_by_one, 2, tiny):
        assert same == 14 * [True]


def test_ranks_with_shards_of_different_bases_are_found_out(tiny, tmp_path):
    tiny_model(seed=9, bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path)
    for outcome in run_ranks(shard_functions.compare_bases, 2, tiny, str(tmp_path)):
        assert outcome.error_type == "DisagreementError"
        assert "base weights of model.layers" in outcome.error


@pytest.mark.full("benchmark")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_script_for_gpus_finds_the_same_bits_and_a_smaller_peak_where_ranks_share(ranks, tmp_path):
    model = save_many_shards(tmp_path, hidden=256, layers=8, shard_bytes=100 * MB)
    done = subprocess.run(
        [sys.executable, "benchmarks/sharded_step.py", str(model), "--ranks", str(ranks)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=360,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["ranks"], found["same"]) == (ranks, True)
    assert found["tensors"] > 100
    assert (found["peak_bytes_sharded"] < found["peak_bytes_whole"]) == (ranks > 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """205 MB in 16 bits, in ten layers."""
    return save_many_shards(tmp_path_factory.mktemp("model"), hidden=896, layers=10, shard_bytes=20 * MB)


@pytest.mark.parametrize(
    ("ranks", "quantization"),
    [(2, "nf4"), *(pytest.param(*one, marks=pytest.mark.full("memory")) for one in ((4, "nf4"), (2, "none")))],
)
def test_the_peak_while_loading_is_the_shard_a_layer_and_one_file(ranks, quantization, tiny, model):
    for rank in values(shard_functions.load_shard_and_watch, ranks, tiny, str(model), quantization, False):
        most = SLACK * (rank["shard"] + rank["layer"] + max(size_of_shards(model)))
        assert rank["own"] <= most
        assert rank["resident"] <= most
        assert rank["kept"] <= rank["shard"] + 10 * MB


@pytest.mark.full("memory")
def test_a_loader_that_shards_in_the_end_would_be_noticed(tiny, model):
    for rank in values(shard_functions.load_shard_and_watch, 4, tiny, str(model), "none", True):
        assert rank["own"] > SLACK * (rank["shard"] + rank["layer"] + max(size_of_shards(model)))
