"""A finished run that goes on as another run, from its adapter."""

import json

import pytest
import yaml
from support.forked_run import finished_run, run_that_fails, run_to_the_end
from support.same_run import assert_same_run, stopped_at

pytestmark = pytest.mark.full("ranks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("finished"))[0]


def measured(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_an_extended_run_begins_where_the_first_one_ended_and_can_be_resumed(finished, tmp_path):
    first, adapter = finished.parent / "run", tmp_path / "adapter"
    (first / "adapter").rename(adapter)
    settings = yaml.safe_load(finished.read_text())
    settings["adapter"] |= {"start_from": str(adapter), "ranks": str(first / "plan.json"), "initial_rank": None}
    settings |= {"pruning": {"rule": "none"}, "evaluation": {"before": True}}
    settings["training"] |= {"max_steps": 6}
    config = tmp_path / "extended.yaml"
    config.write_text(yaml.safe_dump(settings))
    output = run_to_the_end(config, tmp_path / "run", tmp_path / "log")
    assert output.count(f"starting from {adapter}: ") == 1
    assert measured(tmp_path / "run")[0] == pytest.approx(measured(first)[-1], rel=1e-5)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["ranks"] == {
        name: rank for name, rank in json.loads((first / "plan.json").read_text())["ranks"].items() if rank
    }

    assert f"start from {adapter}, rule none" in (tmp_path / "run" / "adapter" / "README.md").read_text()

    for name in ("again", "without", "other"):
        (tmp_path / name).mkdir()
    resumed = stopped_at(3, tmp_path / "run", tmp_path / "again")
    run_to_the_end(config, resumed, tmp_path / "log-again")
    assert_same_run(tmp_path / "run", resumed)

    adapter.rename(tmp_path / "away")
    without = stopped_at(3, tmp_path / "run", tmp_path / "without")
    assert "which is not there any more" in run_to_the_end(config, without, tmp_path / "log-without")
    assert_same_run(tmp_path / "run", without)
    (tmp_path / "away").rename(adapter)

    described = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**described, "lora_alpha": 3}))
    other = stopped_at(3, tmp_path / "run", tmp_path / "other")
    status, text = run_that_fails(config, other, tmp_path / "log-other")
    assert status == 2
    assert "adapter.start_from was '" in text
