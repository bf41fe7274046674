"""From the YAML of a comparison to the runs of its cells."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.repository import REPOSITORY

from dora_dist.compare.cell_result import identity_of
from dora_dist.compare.plan import Cell, Group, Plan
from dora_dist.compare.settings import parse_compare
from dora_dist.config import data as data_config

SHIPPED = sorted((REPOSITORY / "configs" / "compare").glob("*.yaml"))
LEAST: dict[str, Any] = {
    "output_dir": "runs/x",
    "run": {"model": {"path": "m"}, "data": {"train": "train.jsonl", "max_length": 99}},
    "tasks": {"one": {"data": {"eval": "reported.jsonl"}, "search": {"path": "search.jsonl", "max_rows": 5}}},
    "methods": ["lora", "dynamic"],
    "budgets": [4],
    "seeds": [7, 8, 9],
    "learning_rates": [0.01, 0.02],
}


@pytest.fixture
def plan_of(tmp_path: Path):
    """``plan_of(key=value, ...)``: the plan of the least configuration with changes."""

    def plan_of(*overrides: str, **changes: Any) -> Plan:
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump({**LEAST, **changes}))
        return Plan(parse_compare(["--config", str(path), *overrides]))

    return plan_of


def run_of(plan: Plan, method: str, task: str = "one", budget: int = 4):
    return plan.run_config(Cell(Group(task, budget, method), 0.02, 8))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_comparison_is_a_plan(path):
    assert Plan(parse_compare(["--config", str(path)])).num_cells > 1


def test_shipped_comparisons_of_one_folder_agree_on_their_common_cells():
    """Else the later one refuses the cells of the earlier one."""
    folders = Counter(yaml.safe_load(path.read_text())["output_dir"] for path in SHIPPED)
    made: dict[Path, tuple[str, dict[str, Any]]] = {}
    for path in SHIPPED:
        if folders[yaml.safe_load(path.read_text())["output_dir"]] > 1:
            plan = Plan(parse_compare(["--config", str(path)]))
            for cell in (plan.search_cells(group)[0] for group in plan.groups):
                name, identity = made.setdefault(plan.cell_folder(cell), (path.name, identity_of(plan, cell, {})))
                assert identity_of(plan, cell, {}) == identity, (name, path.name, str(cell))
    assert made


def test_the_number_of_cells(plan_of):
    plan = plan_of(search_seeds=2, budgets=[2, 4])
    assert plan.num_cells == 2 * 2 * (2 * 2 + 1)
    group = plan.groups[0]
    searched = plan.search_cells(group)
    assert [(cell.learning_rate, cell.seed) for cell in searched] == [(0.01, 7), (0.01, 8), (0.02, 7), (0.02, 8)]
    assert [cell.seed for cell in plan.reported_cells(group, 0.02)] == [7, 8, 9]
    assert set(plan.reported_cells(group, 0.02)) - set(searched) == {Cell(group, 0.02, 9)}


def test_a_cell_is_a_run_with_both_splits(plan_of):
    config = run_of(plan_of(), "dynamic")
    assert (config.seed, config.training["learning_rate"]) == (8, 0.02)
    assert config.output_dir == "runs/x/cells/one/rank4/dynamic/lr0.02/seed8"
    assert config.data.eval == [
        {"path": "search.jsonl", "max_rows": 5, "name": "search"},
        {"path": "reported.jsonl", "name": "reported"},
    ]
    assert config.distributed.engine == "none"
    assert config.evaluation.before is False


def test_parts_are_measured_beside_the_splits(plan_of):
    parts = {"en": "en.jsonl", "fi": {"path": "fi.jsonl", "max_rows": 5}}
    plan = plan_of(tasks={"one": {**LEAST["tasks"]["one"], "parts": parts}})
    assert plan.parts("one") == ("en", "fi")
    assert run_of(plan, "dynamic").data.eval[2:] == [
        {"path": "en.jsonl", "name": "en"},
        {"path": "fi.jsonl", "max_rows": 5, "name": "fi"},
    ]
    assert plan_of().parts("one") == ()


def test_the_sources_of_a_row_of_the_table_are_parsed_once_for_all_its_cells(plan_of, monkeypatch):
    parsed, parse = [], data_config._source

    def counted(entry, where):
        parsed.append(where)
        return parse(entry, where)

    monkeypatch.setattr(data_config, "_source", counted)
    plan = plan_of()
    runs = [plan.run_config(cell) for cell in plan.possible_cells()]
    assert len(runs) == 2 * 2 * 3
    assert {tuple(source.name for source in run.data.eval_sources) for run in runs} == {("search", "reported")}
    assert sorted(parsed) == sorted(2 * ["data.eval[0]", "data.eval[1]", "data.train[0]"])


def test_methods_differ_in_adapter_and_pruning_only_and_have_one_scale(plan_of):
    run = {**LEAST["run"], "preset": "paper"}
    plan = plan_of(run=run, methods=[*BUILT_IN_NAMES, {"wide": {"from": "no-dem", "adapter": {"initial_rank": 9}}}])
    runs = {name: run_of(plan, name) for name in plan.methods}
    for config in runs.values():
        assert config.adapter.target_rank == 4
        assert config.adapter.alpha / config.adapter.start_rank == 2.0
        assert (config.model, config.data, config.evaluation, config.training, config.checkpoint) == (
            runs["lora"].model,
            runs["lora"].data,
            runs["lora"].evaluation,
            runs["lora"].training,
            runs["lora"].checkpoint,
        )
    lora = runs["lora"]
    assert (lora.adapter.start_rank, lora.adapter.train_gates, lora.pruning.rule) == (4, False, "none")
    assert runs["dynamic"].adapter.start_rank == runs["adalora"].adapter.start_rank == 6
    assert runs["no-dem"].pruning.equilibrium_weight == 0.0
    assert runs["no-smoothing"].pruning.smoothing == 0.0
    assert runs["hard-prune"].pruning.regrow is False
    assert runs["random"].pruning.importance == "random"
    assert runs["magnitude"].pruning.importance == "magnitude"
    assert runs["by-parameters"].pruning.budget_unit == "parameters"
    assert (runs["wide"].adapter.start_rank, runs["wide"].pruning.equilibrium_weight) == (9, 0.0)


BUILT_IN_NAMES = (
    "lora adalora eva dynamic no-dem no-smoothing hard-prune random magnitude sensitivity by-parameters".split()
)


def test_a_task_has_its_own_sections_on_top(plan_of):
    task = {
        "data": {"train": {"path": "other.jsonl"}, "eval": "r.jsonl"},
        "search": "s.jsonl",
        "training": {"max_steps": 3},
        "evaluation": {"exact_match": True},
        "metric": "exact_match",
    }
    run = {**LEAST["run"], "training": {"max_steps": 9, "weight_decay": 0.5}}
    plan = plan_of(run=run, tasks={"other": task, **LEAST["tasks"]})
    config = run_of(plan, "lora", "other")
    assert config.data.train == {"path": "other.jsonl"}
    assert config.data.max_length == 99
    assert (config.training["max_steps"], config.training["weight_decay"]) == (3, 0.5)
    assert (plan.metric("other"), plan.lower_is_better("other")) == ("exact_match", False)
    assert (plan.metric("one"), plan.lower_is_better("one")) == ("loss", True)
    assert run_of(plan, "lora").training["max_steps"] == 9


def test_the_command_line_wins_over_the_file_key_by_key(plan_of):
    run = {**LEAST["run"], "training": {"max_steps": 9, "logging_steps": 3, "weight_decay": 0.5}}
    overrides = ["--run.training.max_steps", "5", "--run.training.weight_decay=1e-3", "--tasks.one.model.path", "other"]
    plan = plan_of("--budgets", "[2, 3]", *overrides, run=run)
    assert plan.config.budgets == [2, 3]
    config = run_of(plan, "lora", budget=3)
    training = {name: config.training[name] for name in ("max_steps", "logging_steps", "weight_decay")}
    assert training == {"max_steps": 5, "logging_steps": 3, "weight_decay": 0.001}
    assert config.model.path == "other"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--run.model.path.x", "1"], "path is 'm' and has no keys"),
        (["--run.model.pth", "1"], "model.pth; did you mean model.path"),
        (["--run.seed", "1"], "run.seed is set by the comparison"),
        (["--run.model.path"], "--run.model.path has no value"),
    ],
)
def test_wrong_keys_on_the_command_line_are_refused(plan_of, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_of(*overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": [2]}, "unknown key budget; did you mean budgets"),
        ({"methods": ["lora", "dynamik"]}, "no built-in method; did you mean dynamic"),
        ({"methods": ["dynamic"]}, "baseline is 'lora', but must be one of methods: dynamic"),
        ({"methods": ["lora", {"mine": {"prunning": {}}}]}, "methods.mine.prunning; did you mean pruning"),
        ({"methods": ["lora", {"mine": {"pruning": {"smooth": 0}}}]}, "pruning.smooth; did you mean pruning.smoothing"),
        ({"methods": ["lora", {"mine": {"training": {"optim": "sgd"}}}]}, "else must be the same for all methods"),
        ({"methods": ["lora", {"mine": {"adapter": {"alpha": 3}}}]}, "adapter.alpha is set by the comparison"),
        (
            {"methods": ["lora", {"mine": {"adapter": {"dropout": 0.5}}}]},
            "adapter.dropout is set, but .* the same",
        ),
        ({"methods": [{"mine": {"from": "lora", "adapter": {"initial_rank": 6}}}]}, "lora starts with its target rank"),
        (
            {"methods": ["lora", {"mine": {"from": "adalora", "pruning": {"importance": "random"}}}]},
            r"AdaLoRA does not read it: .* it reads warmup_fraction, final_fraction, interval\)",
        ),
        (
            {"methods": ["lora", {"mine": {"from": "eva", "adapter": {"init": "inputs"}}}]},
            r"EVA does not read it: .* it reads calibration_rows, target_modules\)",
        ),
        ({"methods": ["lora", "dynamic", "no-dem"]}, "dynamic and no-dem are the same beside run.preset 2026-11"),
        ({"methods": ["lora", "no-smoothing"]}, "pruning.smoothing is 0.0, which has no effect: .*gate_sensitivity"),
        (
            {"run": {**LEAST["run"], "evaluation": {"keep_best": "loss"}}},
            "keep_best is set by the comparison",
        ),
        ({"run": {**LEAST["run"], "evaluation": {"early_stopping": 2}}}, "early_stopping is set by the comparison"),
        ({"methods": ["lora", {"dynamic": {}}]}, "built-in method: give yours another name"),
        ({"methods": ["lora", {"a/b": {}}]}, "'a/b', but must be letters"),
        ({"methods": ["lora", "lora"]}, "hold each entry once"),
        ({"seeds": [1, 1]}, "hold each entry once"),
        ({"budgets": [0]}, "ranks of at least 1"),
        ({"learning_rates": [0.0]}, "be positive"),
        ({"search_seeds": 4}, "between 1 and 3"),
        ({"run": {**LEAST["run"], "seed": 3}}, "run.seed is set by the comparison: set seeds"),
        ({"run": {**LEAST["run"], "distributed": {"engine": "ddp"}}}, "a cell is one process"),
        ({"run": {**LEAST["run"], "training": {"learning_rate": 0.1}}}, "set learning_rates"),
        ({"run": {**LEAST["run"], "trainings": {}}}, "unknown key trainings; did you mean training"),
        ({"run": {**LEAST["run"], "pruning": 3}}, "pruning is 3, but must be a section"),
        ({"run": {**LEAST["run"], "pruning": {"interval": 0}}}, "cells one rank 4 lora: pruning.interval is 0"),
        ({"adalora": {"beta1": 1.0}}, r"adalora.beta1 is 1.0, but must lie in \(0, 1\)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(plan_of, changes, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**changes)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"search": "s"}, r"tasks.one.data.eval is missing"),
        ({"data": {"eval": "r"}}, r"tasks.one.search is missing"),
        ({"data": {"eval": "r"}, "search": "r"}, "are the same source"),
        ({"data": {"eval": ["a", "b"]}, "search": "s"}, "has 2 sources, but must be one"),
        ({"data": {"eval": "r"}, "search": "s", "metrik": "loss"}, "tasks.one.metrik; did you mean metric"),
        ({"data": {"eval": "r"}, "search": "s", "parts": "p"}, "tasks.one.parts is 'p', but must be a mapping"),
        ({"data": {"eval": "r"}, "search": "s", "parts": {"reported": "p"}}, "parts has reported, which is the name"),
        ({"data": {"eval": "r"}, "search": "s", "parts": {"en": ["a", "b"]}}, "parts.en has 2 sources, but must be"),
        (
            {"data": {"eval": "r"}, "search": "s", "parts": {"en": None}},
            "tasks.one.parts.en is missing: a part needs a held",
        ),
        ({"data": {"eval": "r"}, "search": "s", "parts": {"no": "p"}}, "tasks.one.parts has the name 'no', but a name"),
        ({"data": {"eval": "r"}, "search": "s", "parts": {False: "p"}}, "tasks.one.parts has the name False, but a na"),
        ({"data": {"eval": "r"}, "search": "s", "parts": {"2024": "p"}}, "tasks.one.parts has the name '2024', but a"),
        ({"data": {"eval": "r"}, "search": "s", "parts": {"a/b": "p"}}, "tasks.one.parts has the name 'a/b', but a na"),
        ({"data": {"eval": "r"}, "search": "s", "better": "more"}, "must be lower or higher"),
        ({"data": {"eval": "r"}, "search": "s", "metric": "exact_match"}, "set evaluation.exact_match to true"),
        (
            {"data": {"eval": "r"}, "search": "s", "metric": "final_number"},
            "put it into evaluation.metrics, or .* loss",
        ),
        (
            {"task": "sequence_classification", "data": {"eval": "r"}, "search": "s", "metric": "f1"},
            "tasks.one.metric is f1, which is not measured: .* choose one of loss, accuracy, matthews",
        ),
    ],
)
def test_what_is_wrong_with_a_task_is_said(plan_of, task, message):
    with pytest.raises(ValueError, match=message):
        plan_of(tasks={"one": task})


def test_methods_of_peft_are_for_tasks_that_they_can_be_measured_on(plan_of):
    with pytest.raises(ValueError, match="cells one rank 4 adalora: task is seq2seq, but PEFT's AdaLoRA is"):
        plan_of("--run.task", "seq2seq", methods=["lora", "adalora"])
    with pytest.raises(ValueError, match="PEFT's EVA is compared on causal_lm only"):
        plan_of("--run.task", "sequence_classification", methods=["lora", "eva"])


def test_a_method_may_have_a_rate_of_the_columns_own_but_not_adalora(plan_of):
    own = {"training": {"lora_plus_ratio": 4}}
    plan = plan_of(methods=["lora", {"plus": {"from": "lora", **own}}])
    assert run_of(plan, "plus").training["lora_plus_ratio"] == 4
    assert "lora_plus_ratio" not in run_of(plan, "lora").training
    with pytest.raises(ValueError, match="but PEFT's AdaLoRA does not support it"):
        plan_of(methods=["lora", {"plus": {"from": "adalora", **own}}])


def test_a_method_of_peft_makes_a_new_adapter(plan_of):
    def run(**adapter: Any) -> dict[str, Any]:
        return {**LEAST["run"], "preset": "paper", "adapter": adapter}

    with pytest.raises(ValueError, match=r"adapter\.start_from is x, but PEFT's AdaLoRA makes a new adapter"):
        plan_of(run=run(start_from="x"), methods=["adalora"], baseline="adalora")
    with pytest.raises(ValueError, match=r"new_tokens is \['a'\], but PEFT's AdaLoRA trains LoRA factors only"):
        plan_of(run=run(new_tokens=["a"]), methods=["adalora"], baseline="adalora")


def test_adalora_needs_something_to_prune(plan_of):
    with pytest.raises(ValueError, match="AdaLoRA has nothing to prune"):
        plan_of(methods=["lora", {"flat": {"from": "adalora", "adapter": {"initial_rank": 4}}}])


@pytest.mark.parametrize("pruning", [{"rebase": True}, {"importance": "gate_sensitivity"}])
def test_the_baseline_is_plain_lora_whatever_is_set_for_all(plan_of, pruning):
    """Singular components would be made of LoRA's at every event; gates that are not trained have no sensitivity."""
    plan = plan_of(run={**LEAST["run"], "preset": "paper", "pruning": pruning})
    ours, lora = run_of(plan, "dynamic").pruning, run_of(plan, "lora").pruning
    assert all(getattr(ours, name) == value for name, value in pruning.items())
    assert lora.rule == "none"


def test_a_method_that_grows_has_slots_of_its_budget_and_the_scale_of_all(plan_of):
    plan = plan_of(methods=["lora", {"grow": {"from": "dynamic", "pruning": {"rule": "grow"}}}], budgets=[2, 4])
    for budget in (2, 4):
        adapter = run_of(plan, "grow", budget=budget).adapter
        assert (adapter.start_rank, adapter.target_rank, adapter.slots) == (1, budget, 2 * budget)
        assert adapter.scale_of(1) == run_of(plan, "lora", budget=budget).adapter.scale_of(budget) == 2.0


def test_a_method_that_holds_rows_back_is_refused_before_any_cell_runs(plan_of):
    pruning = {"rule": "move", "importance": "ablation_gradient"}
    move = {"move": {"from": "dynamic", "adapter": {"slots": 8}, "pruning": pruning}}
    with pytest.raises(
        ValueError, match=r"cells one rank 4 move: .* ablation_gradient holds back 32 training rows, but"
    ):
        plan_of(methods=["lora", move])


def test_a_routed_method_has_the_rank_at_which_a_prompt_uses_the_budget(plan_of):
    routed = {"from": "lora", "rank_per_budget": 3.5, "adapter": {"routing": "prompt", "modules_per_prompt": 2}}
    plan = plan_of(methods=["lora", {"routed": routed}], budgets=[2, 4])
    assert plan.methods["routed"].says == "lora, rank_per_budget 3.5, modules_per_prompt 2, routing prompt"
    for budget, rank in ((2, 7), (4, 14)):
        adapter = run_of(plan, "routed", budget=budget).adapter
        assert (adapter.target_rank, adapter.start_rank) == (rank, rank)
        assert adapter.scale_of(rank) == run_of(plan, "lora", budget=budget).adapter.scale_of(budget)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0, "methods.routed.rank_per_budget is 0, but must be a positive number"),
        ("a", "methods.routed.rank_per_budget is 'a', but must be a positive number"),
        (1.3, "cells one rank 4 routed: rank_per_budget is 1.3, which gives the target rank 5.2 for budget 4"),
    ],
)
def test_a_rank_that_is_no_whole_number_is_refused(plan_of, factor, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(methods=["lora", {"routed": {"from": "lora", "rank_per_budget": factor}}])
