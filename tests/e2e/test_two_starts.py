"""The same run started twice: the second start is refused while the first one lives, and goes on from it afterwards."""

import json
import os
import time

from support.faulty_rank import faulty_rank
from support.forked_run import log_of, run_forked, run_that_fails, run_to_the_end, start_run
from support.ranks import wait_for_ranks
from support.tiny_run import write_config

from dora_dist.console.files import read_lines


def until(path, holds=bool):
    end = time.monotonic() + 60
    while not (path.exists() and holds(path.read_text())):
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.1)


def test_a_second_start_of_a_run_is_refused_by_all_ranks_and_changes_nothing(tmp_path):
    config, output = write_config(tmp_path), tmp_path / "run"
    faults = {0: {"hang": "forward 4"}, 1: {"hang": "forward 4"}}
    first = start_run(config, output, tmp_path / "first", target=faulty_rank, more=(faults,))
    try:
        until(output / "checkpoint-3" / "complete.json")
        holder = json.loads((output / "claim-1.json").read_text())
        before = (output / "metrics.jsonl").read_text()
        status, text = run_that_fails(config, output, tmp_path / "second")
        assert status == 2, text
        assert "Traceback" not in text
        refused = f"output_dir {output} is in use by another run: process {first[0].pid} on {os.uname().nodename}"
        assert text.count(refused) == 1, text
        assert holder["pid"] == first[0].pid
        assert (output / "metrics.jsonl").read_text() == before
    finally:
        for process in first:
            process.kill()
    wait_for_ranks(first, timeout=10)
    text = run_to_the_end(config, output, tmp_path / "third")
    assert "it has ended" in text
    assert "resuming from" in text
    assert [line["step"] for line in read_lines(output / "metrics.jsonl") if "loss" in line] == list(range(1, 13))
    assert not list(output.glob("claim-*")), log_of(tmp_path / "third")


def test_a_run_that_is_refused_leaves_no_claim_and_no_folder(tmp_path):
    config = write_config(tmp_path)
    finished = run_forked("train", str(config), "--distributed.engine", "none", "--training.max_steps", "1")
    assert finished.status == 2, finished.output
    assert not (tmp_path / "run").exists()
