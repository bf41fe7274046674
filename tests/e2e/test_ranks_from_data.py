"""Runs whose ranks are made from training rows before the first step."""

import json
from pathlib import Path

import pytest
from support.forked_run import finished_run, run_that_fails, run_to_the_end
from support.same_run import assert_same_run, evaluation_of, stopped_at

from dora_dist.adapter.plain_lora import read_lora_adapter
from dora_dist.console.files import read_lines

SAID = "ranks from 20 training rows (adapter.ranks is gradient_spectrum)"
pytestmark = pytest.mark.full("ranks")
COSTS = {"q_proj": 128, "k_proj": 96, "v_proj": 96, "o_proj": 128, "gate_proj": 192, "up_proj": 192, "down_proj": 192}


@pytest.fixture(scope="module")
def spectral(tmp_path_factory) -> tuple[Path, str]:
    """A run of two ranks under ZeRO-2, whose adapter starts along the directions of the same gradient, with a scale by
    rank; and what it printed."""
    adapter = {"initial_rank": None, "ranks": "gradient_spectrum", "init": "gradient", "scale": "sqrt_rank"}
    folder = tmp_path_factory.mktemp("spectral")
    return finished_run(folder, preset="lora", adapter={**adapter, "calibration_rows": 20})


def planned(run: Path) -> dict[str, int]:
    written: dict[str, int] = json.loads((run / "plan.json").read_text())["ranks"]
    return written


def test_the_adapter_has_the_ranks_that_the_run_says_for_the_price_of_uniform_ones(spectral):
    config, output = spectral
    run = config.parent / "run"
    assert output.count(SAID) == 1
    plan = planned(run)
    spent = sum(COSTS[name.rsplit(".", 1)[1]] * rank for name, rank in plan.items())
    assert 0 <= 2 * 2 * sum(COSTS.values()) - spent < max(COSTS.values())
    assert len(plan) == 14
    assert len(set(plan.values())) > 1
    assert max(plan.values()) <= 4
    adapter = read_lora_adapter(run / "adapter")
    assert {name: len(rows) for name, (rows, _) in adapter.items()} == {
        name: rank for name, rank in plan.items() if rank
    }
    (event,) = read_lines(run / "allocation.jsonl")
    assert (event["step"], event["final"], event["num_parameters"]) == (0, True, spent)
    assert f"components {sum(plan.values())}  " in output
    assert json.loads((run / "summary.json").read_text())["ranks"] == plan


def test_a_resumed_run_does_not_choose_again(spectral, tmp_path):
    config, _ = spectral
    resumed = stopped_at(5, config.parent / "run", tmp_path)
    assert SAID not in run_to_the_end(config, resumed, tmp_path / "log")
    assert_same_run(config.parent / "run", resumed)
    assert planned(resumed) == planned(config.parent / "run")


def test_a_run_is_not_gone_on_with_by_another_choice(spectral, tmp_path):
    config, _ = spectral
    resumed = stopped_at(5, config.parent / "run", tmp_path)
    status, text = run_that_fails(config, resumed, tmp_path / "log", "--adapter.ranks", "weight_gradient")
    assert status == 2
    assert "adapter.ranks was 'gradient_spectrum' and is now 'weight_gradient'" in text


@pytest.mark.parametrize("ranks", ["gradient_spectrum", "weight_gradient"])
def test_the_choice_and_the_course_do_not_depend_on_the_number_of_ranks(spectral, ranks, tmp_path):
    runs = []
    for number, engine in ((2, "ddp"), (1, "none")):
        runs.append(tmp_path / engine)
        options = ("--adapter.ranks", ranks, "--training.gradient_accumulation_steps", str(2 // number))
        run_to_the_end(spectral[0], runs[-1], tmp_path / f"log-{engine}", *options, ranks=number, engine=engine)
    assert planned(runs[0]) == planned(runs[1])
    losses = [evaluation_of(run)["eval_loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
