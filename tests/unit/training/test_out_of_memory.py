"""Memory that runs out ends in one message with the settings to change next."""

import pytest
import torch

from dora_dist.base_model.recomputation import Recomputation
from dora_dist.distributed.agreement import RankFailedError
from dora_dist.distributed.out_of_memory import NoMemoryLeftError, explained
from dora_dist.training.out_of_memory import step_advice


def allocate_too_much():
    torch.empty(2**50, dtype=torch.uint8)


def raises(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (allocate_too_much, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1125899906842624 bytes"),
        (raises(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")), r"\(OutOfMemoryError: CUDA out of memory"),
        (raises(RuntimeError("CUDA error: out of memory\nmore")), r"\(RuntimeError: CUDA error: out of memory\)"),
        (raises(MemoryError("no room")), r"\(MemoryError: no room\)"),
    ],
)
def test_every_way_to_run_out_of_memory_is_one_line_with_advice(function, words):
    with (
        pytest.raises(NoMemoryLeftError, match=f"^no memory left in a test .*{words}") as raised,
        explained(lambda: "in a test"),
    ):
        function()
    assert "\n" not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), ValueError("x"), RankFailedError("rank 1: OutOfMemoryError: out of memory")],
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, explained(lambda: "in a test"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("count", "rows", "expected"),
    [
        (0, 1, ["--model.recompute_layers 8, then all", "a smaller --data.max_length"]),
        (12, 1, ["--model.recompute_layers 20, then all", "a smaller --data.max_length"]),
        (24, 1, ["--model.recompute_layers all", "a smaller --data.max_length"]),
        (31, 1, ["--model.recompute_layers all", "a smaller --data.max_length"]),
        (
            32,
            6,
            [
                "--training.per_device_train_batch_size 3 --training.gradient_accumulation_steps 4, which is the same "
                "global batch",
                "a smaller --data.max_length",
            ],
        ),
        (32, 1, ["a smaller --data.max_length"]),
    ],
)
def test_the_next_settings_are_those_that_cost_least(count, rows, expected):
    advice = step_advice(5, Recomputation(count, 32), rows, 2)
    plural = "s" if rows > 1 else ""
    assert advice.startswith(
        f"in step 5, where {count} of 32 layers are recomputed, a micro-batch has {rows} row{plural}"
    )
    assert advice.partition("Set, until it fits: ")[2].split("; ") == expected


def test_a_model_without_layers_to_recompute_is_not_told_to_recompute_them():
    assert "recompute_layers" not in step_advice(1, Recomputation(0, 0), 4, 1)
