"""What ranks exchange in an ordinary step, counted in real runs: gradients once, and a few numbers."""

import json

import pytest
from step_collectives import SETTINGS, collectives
from support.forked_run import log_of, start_run
from support.ranks import wait_for_ranks
from support.tiny_run import write_config
from support.watched_rank import watched_rank

COUNT = ("all_gather", "long int", 1, 1)
"""Of the targets of a step, over all ranks, by the Trainer: what the loss is divided by."""
NORM = ("all_reduce", "float", 1, 1)
"""Of the gradients, by ZeRO, of which each rank has a part; it also says whether all of them are finite."""
FLAG = ("all_reduce", "int", 1, 1)
"""Whether a rank must stop: this project's one exchange."""


def expected(engine, ranks, elements):
    """(collective, type, elements that a rank gives, how often)."""
    gradients = ("all_reduce", "float", elements, 1)
    if engine == "ddp":
        return [gradients, COUNT, FLAG]
    return [gradients, ("all_gather", "float", elements // ranks, 1), COUNT, NORM, FLAG]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full("ranks"))])
@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_a_step_exchanges_gradients_once_and_a_few_numbers(engine, ranks, tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key.split(".")[0] in ("training", "pruning")}
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    overrides += ["--distributed.engine", engine]
    log = tmp_path / "log"
    processes = start_run(
        write_config(tmp_path), tmp_path / "run", log, *overrides, ranks=ranks, target=watched_rank, more=(engine,)
    )
    wait_for_ranks(processes, timeout=120)
    assert [process.exitcode for process in processes] == [0] * ranks, log_of(log, ranks)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"log-collectives-{rank}").read_text())
        listed = [
            tuple(each[key] for key in ("collective", "dtype", "elements", "times")) for each in found["collectives"]
        ]
        assert listed == expected(engine, ranks, found["adapter_elements"])
        assert found["collectives"][0]["bytes"] == found["adapter_bytes"]


def test_a_profile_that_lacks_a_collective_is_refused():
    done = {"name": "gloo:all_reduce", "args": {"Input type": ["int"], "Input Dims": [[2, 3]]}}
    (found,) = collectives([{"name": "c10d::allreduce_"}, done])
    assert found == {"collective": "all_reduce", "dtype": "int", "elements": 6, "bytes": 24, "times": 1}
    with pytest.raises(ValueError, match=r"2 collectives were asked for .* and 1 are in the profile"):
        collectives([{"name": "c10d::allreduce_"}, {"name": "c10d::allgather_"}, done])
