"""The report of the doctor as text: short lines, one row per node, each problem with rule and action."""

import dataclasses
from pathlib import Path

import pytest
from support.doctor_facts import GIB, changed, gpu, job, storage

from dora_dist.console.text import duration, rate
from dora_dist.doctor import report
from dora_dist.doctor.facts import NetworkFacts, Problem
from dora_dist.doctor.grouping import place, ranges

MIB = 2**20


def whole(ranks):
    network = NetworkFacts(backend="nccl", seconds={8: 2e-5, 64 * MIB: 1e-3})
    return "\n".join(
        [
            report.software_section(ranks),
            report.nodes_section(ranks),
            report.environment_section(ranks),
            report.devices_section(ranks),
            report.storage_section(storage(ranks), Path("/scratch/run"), GIB),
            report.network_section(network, len(ranks)),
            report.problems_section([Problem(place(ranks, ranks), "word " * 60, "rule " * 60, "action " * 60)] * 2),
        ]
    )


@pytest.mark.parametrize("gpus", [True, False])
def test_lines_are_short(gpus):
    ranks = changed(job(gpus=gpus), 1, environment={"NCCL_SOCKET_IFNAME": "interface," * 30})
    longest = max(whole(ranks).splitlines(), key=len)
    assert len(longest) <= report.WIDTH


def test_a_row_per_node_and_a_row_for_its_gpus_of_one_kind():
    ranks = job(3, 2)
    lines = report.nodes_section(ranks).splitlines()
    assert lines[0] == "3 nodes, 6 ranks"
    assert [line.split()[:2] for line in lines[2:5]] == [["node1", "0-1"], ["node2", "2-3"], ["node3", "4-5"]]
    ranks = changed(ranks, 1, gpus=(gpu(1, free=GIB),))
    ranks = changed(ranks, 5, gpus=(gpu(1, name="NVIDIA A100"),))
    rows = [line.split()[:6] for line in report.devices_section(ranks).splitlines() if "NVIDIA" in line]
    assert rows == [
        ["node1", "2", "x", "NVIDIA", "H100", "0-1"],
        ["node2", "2", "x", "NVIDIA", "H100", "2-3"],
        ["node3", "1", "x", "NVIDIA", "H100", "4"],
        ["node3", "1", "x", "NVIDIA", "A100", "5"],
    ]
    assert "80.0 GiB    1.00 GiB" in report.devices_section(ranks)


def test_a_variable_that_differs_is_shown_with_its_ranks():
    ranks = [dataclasses.replace(facts, environment={"NCCL_IB_DISABLE": str(facts.rank // 3)}) for facts in job()]
    assert "NCCL_IB_DISABLE=0 (ranks 0-2), 1 (rank 3)" in report.environment_section(ranks)


def test_versions_that_differ_are_announced():
    assert "the same on all ranks" in report.software_section(job())
    assert "others differ" in report.software_section(changed(job(), 2, python="3.12.0"))


def test_bandwidths_of_an_all_reduce():
    text = report.network_section(NetworkFacts(backend="nccl", seconds={64 * MIB: 1e-3}), 4)
    assert "64.0 MiB  1.00 ms            67.1 GB/s       101 GB/s" in text
    assert "the sum of known values is right" in text
    assert "failed, see below" in report.network_section(NetworkFacts(backend="nccl", failures={0: "x"}), 4)


def test_the_end_counts_the_problems():
    assert report.problems_section([]) == "nothing wrong found"
    text = report.problems_section([Problem("rank 1 on node1", "it is", "it should", "do it")])
    assert text.splitlines() == [
        "1 problem",
        "  1. rank 1 on node1: it is",
        "       rule: it should",
        "       do:   do it",
    ]


def test_names_of_ranks():
    ranks = job(6, 2)
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert place(ranks, ranks) == "all 12 ranks"
    assert place(ranks[:3], ranks) == "ranks 0-1 on node1; rank 2 on node2"
    assert place(ranks[:11], ranks).endswith("; ranks 6-7 on node4; and on 2 more nodes")
    assert place(job(1, 1), job(1, 1)) == "node1"


def test_units():
    assert [duration(seconds) for seconds in (2e-5, 0.0123, 4.2)] == ["20.0 us", "12.3 ms", "4.20 s"]
    assert [rate(speed) for speed in (5430, 3.2e8, 1.234e10)] == ["5.43 kB/s", "320 MB/s", "12.3 GB/s"]
