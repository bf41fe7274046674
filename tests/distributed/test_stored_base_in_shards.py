"""A base that comes in 4 bits, in shards on real ranks."""

import torch
from support import shard_functions
from support.ranks import run_ranks
from support.tiny_run import save_tiny_model

from dora_dist.base_model.load import BaseModelSpec
from dora_dist.quantize.writing import write_quantized


def test_it_trains_as_the_whole_one(tmp_path):
    base, stored = save_tiny_model(tmp_path / "base"), tmp_path / "stored"
    stored.mkdir()
    write_quantized(BaseModelSpec(path=str(base)), stored, torch.device("cpu"))
    for outcome in run_ranks(shard_functions.train_both, 2, str(stored), "nf4", 1, timeout=120):
        assert outcome.error is None, outcome.error
        rank = outcome.value
        assert len(rank["found"]) == len(rank["expected"]) > 100
        assert all(ours.equal(theirs) for ours, theirs in zip(rank["found"], rank["expected"], strict=True))
        held, there = rank["before"]
        assert held * 2 == there
