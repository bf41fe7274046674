"""The optimizer's state of a ZeRO run, saved on some ranks and loaded on others: the same numbers everywhere."""

import pytest
import torch
from safetensors.torch import load_file
from support import rank_functions
from support.ranks import run_ranks
from support.tiny_run import save_tiny_model

from dora_dist.console.files import read_json, write_json


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("before", "after", "engine"),
    [
        (2, 1, "zero2"),
        (2, 3, "zero2 in bfloat16"),
        *[pytest.param(*ranks, "zero2", marks=pytest.mark.full("ranks")) for ranks in ((1, 3), (3, 2), (2, 4))],
    ],
)
def test_any_number_of_ranks_loads_what_any_number_saved(before, after, engine, model, tmp_path):
    saved = run_ranks(rank_functions.save_optimizer, before, model, str(tmp_path), 3, engine)
    assert all(outcome.error is None for outcome in saved), [outcome.error for outcome in saved]
    loaded = run_ranks(rank_functions.load_optimizer, after, model, str(tmp_path), engine)
    assert all(outcome.error is None for outcome in loaded), [outcome.error for outcome in loaded]
    expected = saved[0].value
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert all(value.abs().sum() > 0 for name, value in expected.items() if name.endswith("exp_avg"))
    for outcome in loaded:
        assert outcome.value["counts"] == [3.0]
        assert outcome.value["steps"] == 3
        assert outcome.value["states"].keys() == expected.keys()
        assert all(torch.equal(outcome.value["states"][name], expected[name]) for name in expected)
    # No number is in two files: each rank wrote what it owned.
    files = [load_file(path) for path in (tmp_path / "optimizer").glob("rank*")]
    written = sum(value.numel() for file in files for value in file.values())
    assert written == sum(value.numel() for value in expected.values())


def test_the_state_of_another_model_is_refused(model, tmp_path):
    run_ranks(rank_functions.save_optimizer, 1, model, str(tmp_path), 1)
    index = read_json(tmp_path / "optimizer" / "index.json")
    index["owners"] = {name.replace("layers.1", "layers.7"): value for name, value in index["owners"].items()}
    write_json(tmp_path / "optimizer" / "index.json", index)
    (outcome,) = run_ranks(rank_functions.load_optimizer, 1, model, str(tmp_path))
    assert outcome.error_type == "ValueError"
    assert "holds parameters that this model does not have: " in outcome.error


def test_an_optimizer_whose_state_cannot_be_split_is_refused(model):
    (outcome,) = run_ranks(rank_functions.check_odd_optimizer, 1, model)
    assert outcome.error_type == "ValueError"
    assert "state1 is torch.uint8" in outcome.error
    assert "set training.optim to one that keeps a floating-point number per parameter" in outcome.error
