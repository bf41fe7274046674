import dataclasses
import json
import struct
import tracemalloc
from pathlib import Path

import pytest
from support.tiny_models import PROJECTIONS
from support.tiny_run import some_fingerprint

from dora_dist.config.data import DataConfig
from dora_dist.config.model import ModelConfig
from dora_dist.config.run import RunConfig
from dora_dist.console import files
from dora_dist.evaluation.evaluator import ShownAnswer
from dora_dist.method.layer_names import split_name
from dora_dist.runs import pictures, records
from dora_dist.runs.adapter_folder.card import card_of
from dora_dist.runs.claim import Claim
from dora_dist.runs.summary import finish_run, format_summary, is_finished, rank_table, report, summarize
from dora_dist.runs.task_figures import TaskFigure, line_of, record_line

PARENTS = dict.fromkeys(PROJECTIONS[:4], "self_attn") | dict.fromkeys(PROJECTIONS[4:], "mlp")


def module_ranks(blocks: int, initial_rank: int = 6) -> dict[str, int]:
    """Ranks from 0 to the initial one, in the alphabetical order of the names, as a run records them."""
    names = sorted(f"model.layers.{b}.{PARENTS[kind]}.{kind}" for b in range(blocks) for kind in PROJECTIONS)
    return {name: number % (initial_rank + 1) for number, name in enumerate(names)}


def event(step: int, ranks: dict[str, int], final: bool) -> dict:
    kept = {name: list(range(rank)) for name, rank in ranks.items()}
    return {"step": step, "num_kept": sum(ranks.values()), "kept": kept, "returned": 0, "final": final}


def write_run(folder: Path, blocks: int = 2, *, final: bool = True, evaluated: bool = True) -> dict[str, int]:
    ranks = module_ranks(blocks)
    metrics = [{"step": step, "loss": 3.0 / step, "components": 84 - step} for step in (10, 20, 30)]
    for line, seconds in zip(metrics, (0.25, 0.5, 0.05), strict=True):
        line |= {"seconds_per_step": seconds, "tokens_per_second": 200 / seconds}
    if evaluated:
        metrics.insert(0, {"step": 0, "eval_loss": 2.5, "eval_exact_match": 0.125, "eval_examples": 40})
        metrics.append({"step": 30, "eval_loss": 1.25, "eval_exact_match": 0.5, "eval_examples": 40})
    metrics[-1] |= {"session_seconds": 0.5, "session_tokens": 2000}  # of the last session only
    full = dict.fromkeys(ranks, 6)
    for name, lines in {
        records.METRICS: metrics,
        records.ALLOCATION: [event(10, full, False), event(20, ranks, final)],
    }.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    files.write_json(folder / records.RUN, {"settings": some_fingerprint(initial_rank=6).as_dict()})
    return ranks


def picture_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_grid_holds_every_rank_with_blocks_by_number_and_kinds_in_computing_order():
    ranks = module_ranks(12) | {"projector": 4}
    blocks, kinds, grid = pictures.rank_grid(ranks)
    assert blocks == [*map(str, range(12)), "-"]
    assert [kind.rsplit(".", 1)[-1] for kind in kinds] == [*PROJECTIONS, "projector"]
    assert len(grid) == len(ranks)
    assert grid["-", "projector"] == 4
    for name, rank in module_ranks(12).items():
        _, number, kind = split_name(name)
        assert grid[str(number), kind] == rank


def test_blocks_that_are_the_models_own_numbered_parts_are_rows_like_others():
    blocks, kinds, grid = pictures.rank_grid({"10.mlp.up": 3, "2.mlp.up": 4, "2.mlp.down": 5, "head": 6})
    assert (blocks, kinds) == (["2", "10", "-"], ["head", "mlp.down", "mlp.up"])
    assert grid == {("10", "mlp.up"): 3, ("2", "mlp.up"): 4, ("2", "mlp.down"): 5, ("-", "head"): 6}


@pytest.mark.parametrize(
    ("stacks", "titles"),
    [
        (("model.decoder.layers", "model.encoder.layers"), ("decoder", "encoder")),
        (
            ("model.language_model.layers", "model.vision_tower.encoder.layers"),
            ("language_model", "vision_tower.encoder"),
        ),
        (("model.layers", "model.mtp.layers"), ("", "mtp")),
        (("layers", "model.layers"), ("", "model")),
    ],
)
def test_blocks_of_the_same_number_in_two_stacks_are_two_rows(tmp_path, stacks, titles):
    ranks = {
        f"{stack}.{number}.self_attn.{kind}": 10 * place + number
        for place, stack in enumerate(stacks)
        for number in range(11)
        for kind in ("q_proj", "v_proj")
    }
    blocks, kinds, grid = pictures.rank_grid(ranks)
    assert blocks == [f"{title} {number}".strip() for title in titles for number in range(11)]
    assert kinds == ["self_attn.q_proj", "self_attn.v_proj"]
    assert sorted(grid.values()) == sorted(ranks.values())
    assert grid[f"{titles[1]} 7", kinds[0]] == 17
    table = rank_table(ranks)
    assert table[12].split() == [*titles[1].split(), "0", "10", "10", "10.0"]
    assert table[-1].split() == ["mean", "10.0", "10.0", "10.0"]
    assert len({len(line) for line in table}) == 1
    pictures.draw_ranks(ranks, 20, tmp_path / "ranks.png")
    assert picture_size(tmp_path / "ranks.png")[1] > 800


@pytest.mark.parametrize("blocks", [2, 80])
def test_the_rank_picture_has_a_size_to_look_at(tmp_path, blocks):
    pictures.draw_ranks(module_ranks(blocks), 6, tmp_path / "ranks.png")
    width, height = picture_size(tmp_path / "ranks.png")
    assert 600 < width < 2500
    assert 200 < height < 4000
    assert 5_000 < (tmp_path / "ranks.png").stat().st_size < 2_000_000


def test_a_finished_run_is_summarized_from_its_files(tmp_path):
    ranks = write_run(tmp_path)
    assert not is_finished(tmp_path)
    text = finish_run(tmp_path)
    assert is_finished(tmp_path)
    kept = sum(ranks.values())
    for expected in ("30 optimizer steps", "2.5000 -> 1.2500  (40 examples)", "12.5% -> 50.0%", f"84 -> {kept}"):
        assert expected in text
    assert "training time    8 s, 750 tokens/s" in text
    assert "has not ended" not in text
    for kind in PROJECTIONS:
        assert kind in text
    summary = files.read_json(tmp_path / records.SUMMARY)
    assert summary["ranks"] == ranks
    assert summary["components_kept"] == kept
    assert summary["components_at_start"] == 84
    assert summary["before"]["loss"] == 2.5
    assert summary["after"] == {"loss": 1.25, "exact_match": 0.5, "examples": 40}
    for name in (pictures.RANK_PICTURE, pictures.PROGRESS_PICTURE):
        assert min(picture_size(tmp_path / name)) > 200
        assert str(tmp_path / name) in text


def test_a_metric_that_was_not_measured_before_is_shown_alone(tmp_path):
    write_run(tmp_path)
    path = tmp_path / records.METRICS
    path.write_text(path.read_text().replace('"eval_exact_match": 0.125, ', ""))
    text = finish_run(tmp_path)
    assert "2.5000 -> 1.2500  (40 examples)" in text
    assert "exact match      50.0%  (40 examples)" in text
    about = {**files.read_json(tmp_path / records.RUN), "versions": {}, "data": {"train": []}}
    files.write_json(tmp_path / records.RUN, about)
    config = RunConfig(output_dir=str(tmp_path), model=ModelConfig(path="base"), data=DataConfig(train="rows.jsonl"))
    assert "exact match" in card_of(tmp_path, config)[1]


def test_the_figures_of_the_best_checkpoint_are_those_of_the_run(tmp_path):
    write_run(tmp_path)
    with (tmp_path / records.METRICS).open("a") as file:
        for line in (
            {"step": 20, "eval_loss": 1.0, "eval_examples": 40},
            {"step": 30, "eval_loss": 1.5, "eval_examples": 40},
            {"step": 30, records.BEST_STEP: 20, "best_figure": "loss"},
        ):
            file.write(json.dumps(line) + "\n")
    summary = summarize(tmp_path)
    assert (summary["after"]["loss"], summary["best"]) == (1.0, {"step": 20, "figure": "loss"})
    assert "  best checkpoint  of step 20, by loss" in format_summary(summary, tmp_path)
    records.RunRecords(tmp_path, writes=True).truncate_after(30)  # the run goes on from there
    assert (summarize(tmp_path)["after"]["loss"], summarize(tmp_path)["best"]) == (1.5, None)


def test_a_report_has_the_latest_figures_of_tasks(tmp_path):
    write_run(tmp_path)
    assert "colours" not in report(tmp_path)
    errors = {"base_error": None, "adapter_error": None, "difference_error": 0.125}
    figure = TaskFigure(task="colours", metric="acc", examples=4, base=0.5, adapter=0.75, **errors)
    record_line(tmp_path, line_of("adapter", [figure], {}))
    assert report(tmp_path).endswith("+0.2500 ± 0.1250")


def test_what_was_left_out_is_in_the_summary(tmp_path):
    write_run(tmp_path)
    assert "not adapted" not in finish_run(tmp_path)
    left_out = "all-linear leaves out 88.9% of the block weights: model.layers.*.mlp.experts.down_proj 88.9%"
    recorded = files.read_json(tmp_path / records.RUN)
    files.write_json(tmp_path / records.RUN, {**recorded, "left_out": left_out})
    assert f"  not adapted      {left_out}\n" in finish_run(tmp_path)


def test_therank_table_shows_every_rank_and_the_means(tmp_path):
    ranks = write_run(tmp_path)
    lines = format_summary(summarize(tmp_path), tmp_path).splitlines()
    start = next(number for number, line in enumerate(lines) if "rank by layer" in line)
    for block in range(2):
        cells = [ranks[f"model.layers.{block}.{PARENTS[kind]}.{kind}"] for kind in PROJECTIONS]
        assert lines[start + 1 + block].split() == [str(block), *map(str, cells), f"{sum(cells) / 7:.1f}"]
    assert lines[start + 3].split()[-1] == f"{sum(ranks.values()) / 14:.1f}"


def test_a_run_without_evaluation_or_final_event_says_so(tmp_path):
    write_run(tmp_path, final=False, evaluated=False)
    text = finish_run(tmp_path)
    assert "pruning has not ended" in text
    assert "held-out" not in text
    assert (tmp_path / pictures.PROGRESS_PICTURE).is_file()


def test_a_folder_that_is_no_run_is_refused_with_what_is_missing(tmp_path):
    write_run(tmp_path)
    (tmp_path / records.RUN).unlink()
    for of_run in (finish_run, report):
        with pytest.raises(ValueError, match=f"is not the folder of a run: it has no {records.RUN}"):
            of_run(tmp_path)
        with pytest.raises(ValueError, match=r"there is no folder .*elsewhere: give the output_dir of a run"):
            of_run(tmp_path / "elsewhere")


def test_a_run_that_has_not_pruned_yet_cannot_end_but_is_reported(tmp_path):
    write_run(tmp_path)
    (tmp_path / records.ALLOCATION).write_text("")
    with pytest.raises(ValueError, match="no pruning event yet"):
        finish_run(tmp_path)
    text = report(tmp_path)
    assert "30 optimizer steps" in text
    assert "components       74 -> 74  (pruning has not ended)" in text
    assert not (tmp_path / pictures.RANK_PICTURE).exists()
    assert min(picture_size(tmp_path / pictures.PROGRESS_PICTURE)) > 200


AGAIN = "Start the same command again to resume"


@pytest.mark.parametrize(
    ("recorded", "state"),
    [
        ({"error": "the disk is full.", "step": 2}, f"failed at step 2 of 10: the disk is full. {AGAIN}"),
        ({"error": "no memory", "step": 0}, f"failed before its first step: no memory. {AGAIN}"),
        ({"error": "of a comparison"}, f"failed: of a comparison. {AGAIN}"),
        (
            {"error": "preempted at step 4: start the same command again to resume", "step": 4, "stopped": True},
            "was stopped at step 4 of 10: preempted at step 4: start the same command again to resume",
        ),
        (None, f"stopped at step 30 of 10 without a word (killed?). {AGAIN}"),
    ],
)
def test_a_report_says_how_a_run_without_a_result_ended(tmp_path, recorded, state):
    write_run(tmp_path, final=False)
    if recorded is not None:
        assert records.record_failure(tmp_path, **recorded)
        assert not records.record_failure(tmp_path, "another rank, later")
    assert report(tmp_path).splitlines()[1] == f"  state            {state}"
    records.RunRecords(tmp_path, writes=True).forget_end()
    assert "without a word" in report(tmp_path)
    claim = Claim(tmp_path)
    claim.take()
    assert report(tmp_path).splitlines()[1] == "  state            is running, at step 30 of 10"
    claim.release()
    finish_run(tmp_path)
    assert "state" not in report(tmp_path)


def test_a_failure_of_an_earlier_start_is_not_that_of_the_one_that_is_running(tmp_path):
    write_run(tmp_path, final=False)
    records.record_failure(tmp_path, "the disk is full", step=2)
    claim = Claim(tmp_path)
    claim.take()
    assert "failed at step 2" in report(tmp_path), "a run that has failed holds its claim a moment longer"
    failure = files.read_json(tmp_path / records.FAILURE)
    files.write_json(tmp_path / records.FAILURE, {**failure, "when": failure["when"] - 60})
    assert "is running, at step 30 of 10" in report(tmp_path)
    claim.release()
    (tmp_path / records.FAILURE).write_text('{"error": "the di')
    assert "without a word" in report(tmp_path)


def test_one_evaluation_is_a_figure_and_not_a_change(tmp_path):
    write_run(tmp_path, evaluated=False)
    lines = [{"step": 0, "eval_loss": 2.5, "eval_examples": 40}, *files.read_lines(tmp_path / records.METRICS)]
    (tmp_path / records.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "  held-out loss    2.5000  (40 examples)\n" in report(tmp_path)


@pytest.mark.parametrize("name", [records.METRICS, records.ALLOCATION])
def test_a_run_without_a_record_is_reported_by_the_other_one(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).unlink()
    assert f"Run {tmp_path}, " in report(tmp_path)
    assert (tmp_path / pictures.PROGRESS_PICTURE).is_file()


def test_a_report_does_not_make_a_run_look_finished(tmp_path):
    write_run(tmp_path, final=False)
    assert "pruning has not ended" in report(tmp_path)
    assert not is_finished(tmp_path)


class Drawn:
    """The axes of the last picture, as matplotlib has them."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(pictures, "save_picture", self.keep)

    def keep(self, figure, path):
        figure.canvas.draw()
        self.top, self.bottom = figure.axes


def test_one_point_is_seen_and_the_budget_falls_at_its_events(tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch)
    lines = [{"step": 6, "loss": 4.0, "components": 3}, {"step": 6, "eval_loss": 5.0, "eval_examples": 3}]
    pictures.draw_progress(lines, pictures.BudgetCurve(start=9, left={2: 9, 3: 5, 4: 3}, target=3), tmp_path / "x.png")
    training, held_out = drawn.top.lines
    assert (training.get_label(), training.get_marker(), list(training.get_xdata())) == ("training", "o", [6])
    assert (held_out.get_label(), held_out.get_marker()) == ("held-out", "o")
    budget, events, target = drawn.bottom.lines
    assert list(zip(budget.get_xdata(), budget.get_ydata(), strict=True)) == [(0, 9), (2, 9), (3, 5), (4, 3), (6, 3)]
    assert budget.get_drawstyle() == "steps-post"
    assert list(events.get_xdata()) == [2, 3, 4]
    assert set(target.get_ydata()) == {3}
    for axes in (drawn.top.yaxis, drawn.bottom.xaxis):
        labels = [label.get_text() for label in axes.get_ticklabels()]
        assert labels
        assert not [text for text in labels if "e" in text or "^" in text]
    assert all(float(label.get_text()).is_integer() for label in drawn.bottom.xaxis.get_ticklabels())


def test_records_after_a_step_can_be_forgotten_and_a_half_written_line_is_not_counted(tmp_path):
    write_run(tmp_path)
    with (tmp_path / records.METRICS).open("a") as file:
        file.write('{"step": 31, "lo')
    assert [line["step"] for line in files.read_lines(tmp_path / records.METRICS)] == [0, 10, 20, 30, 30]
    records.RunRecords(tmp_path, writes=True).metrics(32, {"loss": 1.0})
    assert [line["step"] for line in files.read_lines(tmp_path / records.METRICS)] == [0, 10, 20, 30, 30, 32]
    answer = ShownAnswer.of(0, "2+2", "4", "5")
    for step in (10, 20):
        records.RunRecords(tmp_path, writes=False).answers(step, {"eval": [answer]})
        records.RunRecords(tmp_path, writes=True).answers(step, {"eval": [answer]})
    assert records.read_answers(tmp_path) == [
        {"step": s, "source": "eval", **dataclasses.asdict(answer)} for s in (10, 20)
    ]
    records.RunRecords(tmp_path, writes=False).truncate_after(10)
    assert len(records.read_events(tmp_path / records.ALLOCATION)) == 2
    run = records.RunRecords(tmp_path, writes=True)
    run.truncate_after(10)
    run.metrics(11, {"loss": 1.0})
    assert [line["step"] for line in records.read_answers(tmp_path)] == [10]
    assert [line["step"] for line in files.read_lines(tmp_path / records.METRICS)] == [0, 10, 11]
    assert [event.step for event in records.read_events(tmp_path / records.ALLOCATION)] == [10]


def test_every_held_out_source_has_a_line_and_a_curve(tmp_path):
    write_run(tmp_path, evaluated=False)
    lines = []
    for step, loss in ((0, 3.0), (30, 1.5)):
        line = {"step": step, "eval_loss": loss, "eval_examples": 250, "eval_exact_match": 0.1}
        for number in range(11):
            line |= {f"eval_mgsm_{number}_loss": loss + number, f"eval_mgsm_{number}_examples": 25}
            line |= {f"eval_mgsm_{number}_exact_match": number / 20}
        lines.append(json.dumps(line) + "\n")
    with (tmp_path / records.METRICS).open("a") as file:
        file.writelines(lines)
    text = finish_run(tmp_path)
    (second,) = (line for line in text.split("\n") if line.startswith("    mgsm_2 "))
    assert second == "    mgsm_2   loss 5.0000 -> 3.5000, exact match 10.0% -> 10.0%  (25 examples)"
    assert sum("mgsm_" in line for line in text.split("\n")) == 11


def test_a_long_record_is_summarized_without_being_held(tmp_path):
    write_run(tmp_path)
    expected = summarize(tmp_path)
    with (tmp_path / records.METRICS).open("a") as file:
        file.writelines(json.dumps({"step": 30, "loss": 1.0, "components": 42}) + "\n" for _ in range(10_000))
    tracemalloc.start()
    found = summarize(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == expected
    assert peak < 2**20, "10,000 lines are more than 2 MiB of dicts"
