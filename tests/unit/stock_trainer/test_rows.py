"""Single rows of a trainer's data."""

import torch

from dora_dist.stock_trainer.rows import without_padding


def test_padding_on_either_side_is_left_out():
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 5, 6, -100, -100]]),
        "label": torch.tensor([3]),
        "name": "row",
    }
    found = without_padding(batch)
    assert {name: value.tolist() for name, value in found.items() if name != "name"} == {
        "input_ids": [[5, 6]],
        "attention_mask": [[1, 1]],
        "labels": [[5, 6]],
        "label": [3],
    }
    assert found["name"] == "row"


def test_a_batch_without_a_mask_is_left_as_it_is():
    batch = {"input_ids": torch.tensor([[1, 0]])}
    assert without_padding(batch) == batch
