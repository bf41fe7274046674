"""Routing on several ranks: the same decisions, and the balancing loss of the global batch."""

import pytest
import torch
from support import rank_functions
from support.ranks import run_ranks

ROWS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def alone():
    return rank_functions.route_share([ROWS])


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0], [1, 2, 3]]], ids=["even", "uneven"])
def test_decisions_and_balancing_loss_are_those_of_one_rank(alone, shares):
    found = [outcome.value for outcome in run_ranks(rank_functions.route_share, 2, shares)]
    torch.testing.assert_close(torch.cat([rank["probabilities"] for rank in found], 1), alone["probabilities"])
    for rank in found:
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
    assert alone["loss"] != pytest.approx(1, abs=0.01)
    assert all(gradient.any() for gradient in alone["gradients"].values())


def test_the_most_probable_modules_of_one_rank_alone_would_give_another_loss(alone):
    """Otherwise the test above would say nothing about the global batch."""
    parts = [rank_functions.route_share([rows])["loss"] for rows in ([0, 1], [2, 3])]
    assert sum(parts) / 2 != pytest.approx(alone["loss"], rel=1e-3)
