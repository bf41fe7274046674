"""The table and the figures, from folders of cells that never ran but have the files of cells that did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparison import write_comparison
from support.repository import REPOSITORY
from support.tiny_run import some_fingerprint

from dora_dist.adapter.plain_lora import write_lora_adapter
from dora_dist.compare.cell_result import check_identity, identity_of
from dora_dist.compare.plan import Cell, Group, Plan
from dora_dist.compare.results import RESULTS, gather, write_results
from dora_dist.compare.settings import parse_compare
from dora_dist.compare.table import TABLE, format_table, write_table
from dora_dist.console import files
from dora_dist.routing.files import write_routed_adapter
from dora_dist.runs import records

ENVIRONMENT = {"began": "2024-05-01T00:00:00Z", "commit": "abc", "dirty": False}
RANKS = {"model.layers.0.q_proj": 2, "model.layers.1.q_proj": 2}
WIDE = {"model.layers.0.q_proj": 3, "model.layers.1.q_proj": 3}


@pytest.fixture
def plan_of(tmp_path):
    def plan_of(**changes: Any) -> Plan:
        return Plan(parse_compare(["--config", str(write_comparison(tmp_path, **changes))]))

    return plan_of


def finish(
    plan: Plan, cell: Cell, search: float, reported: float, ranks: dict[str, int] = RANKS, **settings: Any
) -> None:
    folder = plan.cell_folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / records.IDENTITY, {"identity": {}, "environment": ENVIRONMENT})
    after = {"search_loss": search, "reported_loss": reported, "en_loss": reported / 2, "fi_loss": 2 * reported}
    summary = {"after": after, "ranks": ranks, "initial_rank": 3, "steps": 12}
    files.write_json(folder / records.SUMMARY, summary)
    (folder / records.METRICS).write_text('{"step": 12, "seconds_per_step": 0.5}\n')
    run_settings = some_fingerprint(adapter={"alpha": cell.group.method}).as_dict()
    files.write_json(folder / records.RUN, {"settings": {**run_settings, **settings}})
    factors = {name: (torch.ones(rank, 10), torch.ones(20, rank)) for name, rank in ranks.items()}
    write_lora_adapter(folder / "adapter", factors, None)


def fill(plan: Plan, figures: dict[str, dict[float, list[float]]], **options: Any) -> None:
    """``figures``: method -> learning rate -> figure of every seed, on both splits."""
    for method, by_rate in figures.items():
        for rate, values in by_rate.items():
            for seed, value in zip(plan.config.seeds, values, strict=False):
                finish(plan, Cell(Group("echo", 2, method), rate, seed), value, value, **options)


def row_of(table: str, method: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_complete_table(plan_of):
    plan = plan_of(seeds=[1, 2, 3], learning_rates=[0.1, 0.2, 0.3])
    fill(plan, {"lora": {0.1: [9], 0.2: [1, 2, 3], 0.3: [9]}, "dynamic": {0.1: [9], 0.2: [0.9, 1.8, 2.9], 0.3: [9]}})
    results = gather(plan, ["a note"], "command")
    assert results.complete
    assert results.comparisons == 1
    table = format_table(results)
    assert row_of(table, "lora") == ["lora", "0.2", "2.0000 ± 1.0000", "3", "", "", "120", "6"]
    assert row_of(table, "dynamic")[4].startswith("-0.1333 [-0.27")
    assert "- a note" in table
    assert "grid" not in table
    assert "†" not in table
    assert "Missing" not in table


def test_parts_of_a_task_have_a_table_of_their_own(plan_of):
    parts = {"en": "en.jsonl", "fi": "fi.jsonl"}
    plan = plan_of(
        seeds=[1, 2],
        learning_rates=[0.2],
        tasks={
            "echo": {"data": {"eval": "a"}, "search": "b", "parts": parts},
            "other": {"data": {"eval": "a"}, "search": "b"},
        },
    )
    fill(plan, {"lora": {0.2: [1, 2]}, "dynamic": {0.2: [0.5, 2.5]}})
    results = gather(plan, [], "command")
    assert results.comparisons == 1
    en, fi = (results.groups[1].parts[name] for name in parts)
    assert (en.reported, fi.reported) == ({1: 0.25, 2: 1.25}, {1: 1.0, 2: 5.0})
    assert [cell["parts"] for cell in results.cells[:2]] == [{"en": 0.5, "fi": 2.0}, {"en": 1.0, "fi": 4.0}]
    table = format_table(results)
    assert table.count("loss by part") == 1
    _, of_parts = table.split("loss by part")
    assert row_of(of_parts.split("##")[0], "lora") == ["lora", "0.7500 ± 0.3536", "3.0000 ± 1.4142"]
    assert row_of(of_parts.split("##")[0], "dynamic")[2].startswith("3.0000 ± 2.8284 +0.0000 [-12.7")
    assert "no rate is chosen on them" in table


def test_two_seeds_of_three_are_not_passed_off_as_three(plan_of):
    plan = plan_of(seeds=[1, 2, 3], learning_rates=[0.2])
    fill(plan, {"lora": {0.2: [1, 2, 3]}, "dynamic": {0.2: [1, 2]}})
    cell = Cell(Group("echo", 2, "dynamic"), 0.2, 3)
    plan.cell_folder(cell).mkdir(parents=True)
    records.record_failure(plan.cell_folder(cell), "OSError: disk\nfull", diverged=False)
    results = gather(plan, [], "command")
    table = format_table(results)
    assert not results.complete
    assert row_of(table, "dynamic")[3] == "**2 of 3**"
    assert "- echo rank 2 dynamic, learning rate 0.2, seed 3: OSError: disk full" in table
    assert results.groups[1].difference.number == 2
    assert "was not searched" in table


def test_one_seed_has_no_interval(plan_of):
    plan = plan_of(seeds=[1], learning_rates=[0.2])
    fill(plan, {"lora": {0.2: [1.0]}, "dynamic": {0.2: [1.5]}})
    assert row_of(format_table(gather(plan, [], "command")), "dynamic")[2:6] == [
        "1.5000 ± n/a",
        "1",
        "+0.5000 [n/a]",
        "n/a",
    ]


def test_the_grids_edge_is_shouted(plan_of):
    plan = plan_of(seeds=[1], learning_rates=[0.1, 0.2])
    fill(plan, {"lora": {0.1: [1.0], 0.2: [2.0]}, "dynamic": {0.1: [2.0], 0.2: [1.0]}})
    table = format_table(gather(plan, [], "command"))
    assert row_of(table, "lora")[1] == "0.1 **(lowest of the grid!)**"
    assert row_of(table, "dynamic")[1] == "0.2 **(highest of the grid!)**"
    assert table.count("widen learning_rates") == 2


def test_more_parameters_are_marked(plan_of):
    plan = plan_of(seeds=[1], learning_rates=[0.1])
    fill(plan, {"lora": {0.1: [1.0]}})
    finish(plan, Cell(Group("echo", 2, "dynamic"), 0.1, 1), 1.0, 1.0, ranks=WIDE)
    table = format_table(gather(plan, [], "command"))
    assert row_of(table, "dynamic")[6] == "180 †"
    assert "† differs from lora" in table


def test_one_component_more_is_not_marked(plan_of):
    plan = plan_of(seeds=[1], learning_rates=[0.1])
    fill(plan, {"lora": {0.1: [1.0]}})
    finish(plan, Cell(Group("echo", 2, "dynamic"), 0.1, 1), 1.0, 1.0, ranks={**RANKS, "model.layers.1.q_proj": 3})
    assert row_of(format_table(gather(plan, [], "command")), "dynamic")[6] == "150"


def test_a_rate_that_diverged_is_out_and_a_reported_cell_that_did_is_missing(plan_of):
    plan = plan_of(seeds=[1, 2], learning_rates=[0.1, 0.2])
    fill(plan, {"lora": {0.1: [1.0, 2.0], 0.2: [0.5]}})
    group = Group("echo", 2, "lora")
    for cell in (Cell(group, 0.2, 1), Cell(group, 0.1, 2)):
        records.record_failure(plan.cell_folder(cell), "NonFiniteLossError: step 3", diverged=True)
    results = gather(plan, [], "command")
    (lora,) = (group for group in results.groups if group.method == "lora")
    assert lora.learning_rate == 0.1
    assert lora.search == {"0.1": 1.0, "0.2": None}
    assert lora.reported == {1: 1.0}
    assert lora.missing == ["echo rank 2 lora, learning rate 0.1, seed 2: NonFiniteLossError: step 3"]


def test_where_every_rate_diverged_it_says_so(plan_of):
    plan = plan_of(seeds=[1], learning_rates=[0.1, 0.2], methods=["lora"])
    fill(plan, {"lora": {0.1: [float("nan")], 0.2: [float("nan")]}})
    results = gather(plan, [], "command")
    assert results.groups[0].missing == ["echo rank 2 lora: every learning rate has diverged"]
    assert row_of(format_table(results), "lora")[1:3] == ["missing", "missing"]


def test_methods_run_under_other_conditions_are_not_compared(plan_of):
    plan = plan_of(seeds=[1], learning_rates=[0.1])
    fill(plan, {"lora": {0.1: [1.0]}})
    finish(plan, Cell(Group("echo", 2, "dynamic"), 0.1, 1), 1.0, 1.0, **{"data order": "another"})
    with pytest.raises(ValueError, match=r"seed 1: data order is 'another' in cells echo rank 2 dynamic and 'same'"):
        gather(plan, [], "command")


def test_methods_with_a_rate_of_the_columns_own_are_compared(plan_of):
    plus = {"plus": {"from": "lora", "training": {"lora_plus_ratio": 4}}}
    plan = plan_of(seeds=[1], learning_rates=[0.1], methods=["lora", plus])
    for method, ratio in (("lora", 1.0), ("plus", 4)):
        training = {"learning_rate": 0.1, "lora_plus_ratio": ratio}
        finish(plan, Cell(Group("echo", 2, method), 0.1, 1), ratio, ratio, training=training)
    assert row_of(format_table(gather(plan, [], "command")), "plus")[2].startswith("4.0000")


def test_a_setting_that_came_later_is_that_of_the_record_where_it_has_its_default(plan_of):
    plan = plan_of(seeds=[1], learning_rates=[0.1])
    cell = Cell(Group("echo", 2, "dynamic"), 0.1, 1)
    identity = identity_of(plan, cell, {"train": "x"})
    folder = plan.cell_folder(cell)
    folder.mkdir(parents=True)
    older = {name: value for name, value in identity.items() if name != "pruning.budget_unit"}
    files.write_json(folder / records.IDENTITY, {"identity": older, "environment": ENVIRONMENT})
    check_identity(plan, cell, identity)
    with pytest.raises(ValueError, match=r"made with pruning\.budget_unit 'components', but now it is 'parameters'"):
        check_identity(plan, cell, {**identity, "pruning.budget_unit": "parameters"})
    with pytest.raises(ValueError, match="made with examples of train 'x', but now it is 'y'"):
        check_identity(plan, cell, {**identity, "examples of train": "y"})


def test_an_empty_comparison_says_what_is_missing(plan_of):
    results = gather(plan_of(), [], "command")
    assert not results.complete
    assert all("not run yet" in line for group in results.groups for line in group.missing)
    assert format_table(results)


def test_who_reads_the_table_while_it_is_written_sees_the_former_one_whole(plan_of, tmp_path):
    (tmp_path / TABLE).write_text("former")
    with (tmp_path / TABLE).open() as reader:
        write_table(gather(plan_of(), [], "command"), tmp_path / TABLE)
        assert reader.read() == "former"
    assert (tmp_path / TABLE).read_text().startswith("# Comparison")
    assert not list(tmp_path.glob("*.tmp"))


def test_results_are_written_with_the_keys_of_those_that_were_recorded(plan_of, tmp_path):
    plan = plan_of(seeds=[1, 2], learning_rates=[0.1])
    fill(plan, {"lora": {0.1: [1.0, 2.0]}, "dynamic": {0.1: [1.5, 2.25]}})
    write_results(gather(plan, [], "command"), tmp_path / RESULTS)
    written = files.read_json(tmp_path / RESULTS)
    recorded = files.read_json(REPOSITORY / "benchmarks" / "results" / "evidence" / "sst2" / RESULTS)
    for ours, theirs in (
        (written, recorded),
        (written["config"], recorded["config"]),
        (written["groups"][1], recorded["groups"][1]),
        (written["groups"][1]["difference"], recorded["groups"][1]["difference"]),
        (written["cells"][0], recorded["cells"][0]),
    ):
        assert set(ours) - {"stored", "parts"} == set(theirs)  # those two came later
    assert written["groups"][0]["difference"] is None


def test_the_cells_paths_are_relative(plan_of, tmp_path):
    plan = plan_of(seeds=[1], learning_rates=[0.1])
    fill(plan, {"lora": {0.1: [1.0]}})
    for cell in gather(plan, [], "command").cells:
        assert not Path(cell["folder"]).is_absolute()
        assert str(tmp_path) not in cell["folder"]


def test_of_a_routed_adapter_those_count_that_a_prompt_uses(plan_of):
    routed = {"from": "lora", "rank_per_budget": 1.5, "adapter": {"routing": "prompt"}}
    plan = plan_of(methods=["lora", {"routed": routed}], seeds=[1], learning_rates=[0.2])
    fill(plan, {"lora": {0.2: [1]}, "routed": {0.2: [2]}})
    blocks = [[f"model.layers.0.{name}" for name in "qkv"]]
    factors = {name: (torch.ones(3, 10), torch.ones(20, 3)) for name in blocks[0]}
    routers = {"0.pooler": torch.ones(4), "0.weight": torch.ones(3, 4)}
    folder = plan.cell_folder(Cell(Group("echo", 2, "routed"), 0.2, 1)) / "adapter"
    write_routed_adapter(folder, factors=factors, routers=routers, blocks=blocks, modules_per_prompt=2, base_model=None)
    table = format_table(gather(plan, [], "command"))
    assert row_of(table, "routed")[6] == "180 of 270 †"  # two of three modules, each of 3 x (10 + 20)
    assert row_of(table, "lora")[6] == "120"
    assert "parameters are those that a prompt uses if all modules" in table
