"""``python -m dora_dist.benchmark`` as a command, tiny."""

import json

import pytest
from support.forked_run import run_forked

PNG = b"\x89PNG"


def benchmark(*arguments):
    return run_forked("benchmark", *arguments, timeout=200)


def test_the_comparison_writes_a_table_a_picture_and_all_figures(tmp_path):
    done = benchmark("--quick", "--checkpointing", "off", "--profile", "dynamic", "--output", tmp_path)
    assert done.status == 0, done.output
    result = json.loads((tmp_path / "benchmark.json").read_text())
    environment = result["environment"]
    assert environment["command"].startswith("python -m dora_dist.benchmark --quick")
    assert {"cpu", "cores", "torch_threads", "os", "commit", "dirty"} <= set(environment)
    assert {"torch", "transformers", "peft", "bitsandbytes", "deepspeed"} <= set(environment["versions"])
    (record,) = result["records"]
    contestants = record["contestants"]
    assert list(contestants) == ["floor", "peft-lora", "peft-adalora", "dynamic", "dynamic-pruned"]
    for figures in contestants.values():
        assert len(figures["times"]) == environment["rounds"]
        assert {"seconds", "tokens_per_second", "time_ratio", "to_floor", "own_cost"} <= set(figures)
        assert figures["peak_bytes"] > 0
        assert figures["model_flops_utilisation"] is None  # nobody said what the peak is
    assert contestants["peft-lora"]["time_ratio"]["median"] == contestants["peft-lora"]["memory_ratio"] == 1
    assert set(record["method"]["seconds"]) == {
        "penalty, forward",
        "penalty, backward",
        "scoring and smoothing",
        "agreement",
    }
    assert 0 < record["method"]["share_of_step"] < 1
    assert sum(record["kept_ranks"]) == 8 * len(record["kept_ranks"])
    assert (tmp_path / "benchmark.png").read_bytes().startswith(PNG)
    assert "aten::" in (tmp_path / "profile_64x2_dynamic.txt").read_text()
    for name in contestants:
        assert name in done.output


def test_scoring_writes_its_figures(tmp_path):
    done = benchmark("--quick", "--scoring", "--output", tmp_path)
    assert done.status == 0, done.output
    result = json.loads((tmp_path / "scoring.json").read_text())
    assert result["layers"] == sum(one["layers"] for one in result["dense_by_shape"]) == 14
    assert result["largest_allocation_bytes"] > 0
    assert result["accuracy"]["opposing_closed_relative_error"] < 1e-5


def test_generating_compares_adapters_of_as_many_parameters_in_fewer_modules(tmp_path):
    done = benchmark("--quick", "--generating", "--output", tmp_path)
    assert done.status == 0, done.output
    result = json.loads((tmp_path / "generation.json").read_text())
    (record,) = result["records"]
    contestants = record["contestants"]
    assert list(contestants) == ["floor", "7 a block", "3 a block", "1 a block"]
    assert [figures["adapted_modules"] for figures in contestants.values()] == [0, 14, 6, 2]
    parameters = [figures["adapter_parameters"] for figures in contestants.values()]
    assert parameters[0] == 0
    assert parameters[1] == 2 * 8 * (4 * 128 + 3 * 256)  # rank 8 of all modules of a width of 64
    assert all(0 <= parameters[1] - number < 256 for number in parameters[2:])
    for figures in contestants.values():
        assert len(figures["times"]) == result["environment"]["rounds"]
        assert figures["tokens_per_second"] > 0
    assert contestants["floor"]["to_floor"]["median"] == 1
    assert "7 a block" in done.output


@pytest.mark.full("benchmark")
def test_growth_has_all_axes_and_real_ranks(tmp_path):
    done = benchmark("--quick", "--growth", "--output", tmp_path)
    assert done.status == 0, done.output
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert list(points) == ["layers", "hidden", "rank", "world"]
    assert [point["world"] for point in points["world"]][:2] == [1, 2]
    assert len({point["threads"] for point in points["world"]}) == 1
    for along in points.values():
        assert all("share" in point["contestants"]["dynamic"] for point in along)
    assert (tmp_path / "growth.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("arguments", ["--shapes 500x8", "--device cuda", "--rank 4"])
def test_what_cannot_be_ends_with_a_message_and_status_2(arguments, tmp_path):
    done = benchmark(*arguments.split(), "--output", tmp_path / "results")
    assert done.status == 2
    assert done.output.startswith(f"error: {arguments.split()[0]}")
    assert not (tmp_path / "results").exists()
