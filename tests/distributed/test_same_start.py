"""Before the first step: ranks that hold other settings, data or weights than the others."""

import platform

import pytest
from support import rank_functions
from support.ranks import run_ranks
from support.tiny_models import tiny_model

NODE = platform.node()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two copies of a model, of which one has other weights."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("same", "other")}
    for name, folder in folders.items():
        tiny_model(seed=int(name == "other")).save_pretrained(folder)
    return {name: str(folder) for name, folder in folders.items()}


@pytest.mark.parametrize(
    ("base", "settings", "differs"),
    [
        ("same", {"training": {"learning_rate": 2e-3}}, "training.learning_rate"),
        ("same", {"pruning": {"smoothing": 0.8}}, "pruning.smoothing"),
        ("same", {"examples": {"train": "50, fedcba9876543210"}}, "examples of train"),
        ("same", {"data_order": "another"}, "data order"),
        ("other", {}, "base weights of "),
    ],
)
def test_a_rank_that_differs_is_named_on_all_ranks_with_the_first_difference(bases, base, settings, differs):
    outcomes = run_ranks(rank_functions.start_alike, 3, bases["same"], 1, bases[base], settings)
    assert {outcome.error_type for outcome in outcomes} == {"DisagreementError"}
    (message,) = {outcome.error for outcome in outcomes}
    assert f"disagree on settings, data or base model: rank 1 ({NODE}) against ranks 0, 2; " in message
    assert f"first difference in {differs}" in message


def test_a_rank_that_computes_by_other_kernels_is_named(bases):
    """As one would whose node lacks the package."""
    outcomes = run_ranks(rank_functions.start_alike, 2, bases["same"], 1, bases["same"], {}, ("rope",))
    assert {outcome.error_type for outcome in outcomes} == {"DisagreementError"}
    assert all("first difference in the kernels in use (model.kernels)" in outcome.error for outcome in outcomes)


def test_ranks_that_are_alike_start(bases):
    outcomes = run_ranks(rank_functions.start_alike, 2, bases["same"], 1, bases["same"], {})
    assert [outcome.error for outcome in outcomes] == [None, None]
