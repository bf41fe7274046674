"""Where prompts end: in padded rows and in packed ones, with answers and without."""

import pytest
import torch

from dora_dist.data.encoding.encoder import IGNORED
from dora_dist.routing.prompts import find_prompts

_ = IGNORED
DEVICE = torch.device("cpu")


def find(shape, mask=None, positions=None, labels=None):
    given = [None if rows is None else torch.tensor(rows) for rows in (mask, positions, labels)]
    return find_prompts(shape, DEVICE, *given)


def places(prompts):
    """Places in the flattened batch by prompt."""
    return [prompts.pooled[prompts.owners == number].tolist() for number in range(len(prompts.trained))]


def test_a_prompt_is_what_stands_before_the_first_target():
    mask = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    prompts = find((2, 5), mask, labels=[[_, _, 7, 8, 9], [_, 7, 8, _, _]])
    assert places(prompts) == [[0, 1], [5]]
    assert prompts.of_token.tolist() == [[0] * 5, [1] * 5]
    assert prompts.trained.tolist() == [True, True]


def test_later_turns_are_not_a_prompt():
    assert places(find((1, 6), labels=[[_, _, 7, _, _, 8]])) == [[0, 1]]


@pytest.mark.parametrize("mask", [[[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1]]])
def test_without_labels_all_but_the_padding_is_the_prompt(mask):
    prompts = find((2, 4), mask)
    assert places(prompts) == [[at for at in range(4) if mask[0][at]], [4, 5, 6, 7]]
    assert not prompts.trained.any()


def test_padding_on_the_left_does_not_hide_the_answer():
    assert places(find((1, 5), [[0, 0, 1, 1, 1]], labels=[[_, _, _, 7, 8]])) == [[2]]


def test_examples_of_a_packed_row_have_prompts_of_their_own():
    positions = [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1, 0, 1]]
    labels = [[_, _, 7, _, _, _, 8, _], [_, 7, 8, _, _, 9, _, _]]
    prompts = find((2, 8), positions=positions, labels=labels)
    assert places(prompts) == [[0, 1], [3, 4, 5], [7], [8], [12], [14, 15]]
    assert prompts.of_token.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [3, 3, 3, 3, 4, 4, 5, 5]]
    assert prompts.trained.tolist() == [True, True, False, True, True, False], "padding has no answer"


def test_the_first_token_is_a_prompt_though_it_has_a_label():
    """Collators of packed rows take that label away, those of padded rows leave it: nothing predicts the token."""
    alone = find((1, 3), [[1, 1, 1]], labels=[[5, 6, 7]])
    packed = find((1, 6), positions=[[0, 1, 2, 0, 1, 2]], labels=[[_, 6, 7, _, 6, 7]])
    assert places(alone) == [[0]]
    assert places(packed) == [[0], [3]]


def test_positions_that_are_the_same_for_all_rows():
    assert places(find((2, 3), positions=[[0, 1, 2]])) == [[0, 1, 2], [3, 4, 5]]


def test_a_mask_that_does_not_say_what_is_padding_is_refused():
    with pytest.raises(
        ValueError, match=r"attention_mask has shape \(1, 1, 3, 3\), but .* shape \(1, 3\) \(rows, tokens\)"
    ):
        find_prompts((1, 3), DEVICE, torch.ones(1, 1, 3, 3))
