"""Methods of PEFT beside this project's runs: the same loss on the same data, their own rules, a whole result."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from support.comparison import write_classification_comparison, write_comparison
from support.tiny_encoders import tiny_classifier
from support.tiny_models import load_base, tokens
from support.tiny_run import save_tiny_model
from transformers import AutoModelForSequenceClassification

from dora_dist.adapter.model import prepare_heads
from dora_dist.adapter.plain_lora import read_lora_adapter, write_lora_adapter
from dora_dist.compare.cell import run_cell
from dora_dist.compare.peers import adalora
from dora_dist.compare.peers.training import TaskLoss, check_finite
from dora_dist.compare.plan import Cell, Group, Plan
from dora_dist.compare.settings import parse_compare
from dora_dist.config.parse import load_config
from dora_dist.console.errors import ExpectedRunError
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.runs.records import LOG
from dora_dist.setup import run_data
from dora_dist.setup.resolve import resolve_run
from dora_dist.setup.tasks import TASK_PARTS
from dora_dist.training.controller import NonFiniteAdapterError

RUN_CHANGES = ("--run.adapter.dropout", "0.0")


def run_one(folder: Path, method: str, *overrides: str, write=write_comparison):
    """Run one cell; its plan, the cell, and the lines of its metrics."""
    path = write(folder, methods=["lora", "adalora", *(["eva"] if method == "eva" else [])])
    plan = Plan(parse_compare(["--config", str(path), "--output_dir", str(folder / "out"), *RUN_CHANGES, *overrides]))
    cell = Cell(Group("echo", 2, method), 0.01, 1)
    assert run_cell(plan, cell, {}, {}) is None, (plan.cell_folder(cell) / LOG).read_text()
    lines = (plan.cell_folder(cell) / "metrics.jsonl").read_text().splitlines()
    return plan, cell, [json.loads(line) for line in lines]


def write_regression_comparison(folder: Path, **changes):
    return write_classification_comparison(folder, numbers=True, **changes)


ALSO = [write_classification_comparison, write_regression_comparison]


@pytest.fixture(
    scope="module",
    params=[write_comparison, *(pytest.param(write, marks=pytest.mark.full("compare")) for write in ALSO)],
)
def write(request):
    return request.param


@pytest.fixture(scope="module")
def lora(tmp_path_factory, write):
    return run_one(tmp_path_factory.mktemp("lora"), "lora", write=write)


@pytest.fixture(scope="module")
def adalora_run(tmp_path_factory, write):
    return run_one(tmp_path_factory.mktemp("adalora"), "adalora", "--adalora.orth_reg_weight", "0.0", write=write)


def test_without_its_regularizer_it_computes_the_loss_of_a_run_of_ours(lora, adalora_run):
    """In the first step both adapters are 0, so that the losses are those of the base, and of a head that starts alike,
    on the first batch."""
    first, other = lora[2][0], adalora_run[2][0]
    assert (first["step"], other["step"]) == (1, 1)
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert [line["learning_rate"] for line in adalora_run[2] if "loss" in line] == pytest.approx(
        [line["learning_rate"] for line in lora[2] if "loss" in line]
    )


def test_the_regularizer_counts_once_a_step_whatever_the_accumulation(tmp_path, adalora_run, write):
    losses = []
    for number, (rows, accumulation) in enumerate(((8, 1), (2, 4))):
        training = (
            "--run.training.per_device_train_batch_size",
            str(rows),
            "--run.training.gradient_accumulation_steps",
            str(accumulation),
        )
        _, _, lines = run_one(tmp_path / str(number), "adalora", *training, write=write)
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0][0] > adalora_run[2][0]["loss"] + 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_it_prunes_to_its_budget_between_the_same_steps_as_ours(lora, adalora_run):
    kept = {line["step"]: line["components"] for line in adalora_run[2] if "components" in line}
    layers = lora[2][0]["components"] // 2
    final = BudgetSchedule(total_steps=12, num_layers=layers, initial_rank=3, target_rank=2, interval=2).final_step
    assert kept[1] == layers * 3
    assert kept[final] == kept[12] == layers * 2
    assert {line["step"] for line in adalora_run[2] if line.get("components") == layers * 3} == {1}


def test_it_is_measured_and_saved_with_the_head_that_it_has_trained(tmp_path):
    """Read by stock PEFT, the adapter and its head give the losses that were reported."""
    plan, cell, lines = run_one(tmp_path, "adalora", write=write_classification_comparison)
    folder = plan.cell_folder(cell)
    config = load_config(folder / "config.yaml")
    tokenizer, data = run_data.read_data(config)
    assert peft.PeftConfig.from_pretrained(folder / "adapter").modules_to_save == ["classifier"]
    card = (folder / "adapter" / "README.md").read_text()
    assert "method         PEFT's AdaLoRA" in card
    assert "12 of 12, 8 rows each" in card
    base = AutoModelForSequenceClassification.from_pretrained(config.model.path, num_labels=2)
    stock = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    resolved = resolve_run(config, tokenizer, data)
    evaluator = TASK_PARTS[config.task].evaluator(config, resolved, Agreement(), stock)
    measured = {f"eval_{name}": value for name, value in evaluator(stock).items()}
    assert measured == pytest.approx({name: value for name, value in lines[-1].items() if name != "step"}, rel=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_what_is_saved_is_what_was_trained(tmp_path, quantization):
    base = save_tiny_model(tmp_path / "model")
    schedule = BudgetSchedule(total_steps=6, num_layers=14, initial_rank=4, target_rank=2, interval=1)
    model = peft.get_peft_model(load_base(base, quantization, torch.float32), _config(schedule))
    _train(model, 6)
    kept = adalora.kept_triplets(model)
    factors = adalora.folded_triplets(model, kept)
    adalora.check_budget(factors, schedule)
    ranks = [int(mask.sum()) for mask in kept.values()]
    assert sum(ranks) == 14 * 2
    assert len(set(ranks)) > 1
    write_lora_adapter(tmp_path / "adapter", factors, None)
    stock = peft.PeftModel.from_pretrained(load_base(base, quantization, torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        trained, saved = model.eval()(input_ids=tokens()).logits, stock.eval()(input_ids=tokens()).logits
        plain = load_base(base, quantization, torch.float32)(input_ids=tokens()).logits
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(saved, trained, rtol=0, atol=1e-4 * float((trained - plain).abs().max()))


def test_a_module_that_peft_would_train_beside_the_head_is_an_error():
    """It looks for names that end in ``score``; what it trained there would be missing in what is saved."""
    base = tiny_classifier()
    base.bert.score = torch.nn.Linear(4, 4)
    schedule = BudgetSchedule(total_steps=6, num_layers=12, initial_rank=4, target_rank=2, interval=1)
    config = dataclasses.replace(_config(schedule), task_type="SEQ_CLS", target_modules=["query"])
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"is classifier, but PEFT would train .*bert\.score"):
        prepare_heads(model, ["classifier"], torch.float32)


def test_evaluation_is_of_the_task_alone(tmp_path):
    base = save_tiny_model(tmp_path / "model")
    schedule = BudgetSchedule(total_steps=6, num_layers=14, initial_rank=4, target_rank=2, interval=1)
    model = peft.get_peft_model(load_base(base, "none", torch.float32), _config(schedule)).eval()
    batch = {"input_ids": tokens(), "labels": tokens()}
    with torch.no_grad():
        plain = load_base(base, "none", torch.float32)(**batch).loss
        assert model(**batch).loss > plain + 0.1
        assert TaskLoss(model)(**batch).loss == pytest.approx(float(plain), rel=1e-6)


def test_an_adapter_that_is_none_is_refused():
    schedule = BudgetSchedule(total_steps=6, num_layers=1, initial_rank=4, target_rank=2, interval=1)
    good = torch.ones(2, 5), torch.ones(3, 2)
    check_finite("a peer", {"layer": good})
    with pytest.raises(NonFiniteAdapterError, match="the adapter of a peer is not finite in layer"):
        check_finite("a peer", {"layer": (good[0] * torch.nan, good[1])})
    adalora.check_budget({"layer": good}, schedule)
    with pytest.raises(ExpectedRunError, match="kept 3 triplets instead of the budget 2"):
        adalora.check_budget({"layer": (torch.ones(3, 5), torch.ones(3, 3))}, schedule)


@pytest.mark.full("compare")
def test_eva_starts_at_the_base_with_pefts_ranks_and_ends_in_an_adapter_that_gives_what_was_reported(tmp_path):
    """Its own PEFT loads the result; the budget in ranks is met, and not every layer has the same."""
    plan, cell, lines = run_one(tmp_path / "eva", "eva")
    _, _, of_lora = run_one(tmp_path / "lora", "lora")
    assert lines[0]["loss"] == pytest.approx(of_lora[0]["loss"], rel=1e-5)
    folder = plan.cell_folder(cell)
    ranks = [a.shape[0] for a, _ in read_lora_adapter(folder / "adapter").values()]
    assert sum(ranks) == lines[0]["components"] == of_lora[0]["components"]
    assert len(set(ranks)) > 1
    config = load_config(folder / "config.yaml")
    tokenizer, data = run_data.read_data(config)
    stock = peft.PeftModel.from_pretrained(load_base(config.model.path, "nf4", torch.float32), folder / "adapter")
    resolved = resolve_run(config, tokenizer, data)
    evaluator = TASK_PARTS[config.task].evaluator(config, resolved, Agreement(), stock)
    measured = {f"eval_{name}": value for name, value in evaluator(TaskLoss(stock.eval())).items()}
    assert measured == pytest.approx({name: value for name, value in lines[-1].items() if name in measured}, rel=1e-4)


def _config(schedule: BudgetSchedule) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=schedule.initial_rank,
        target_r=schedule.target_rank,
        tinit=0,
        tfinal=schedule.total_steps - schedule.final_step,
        total_step=schedule.total_steps,
        lora_alpha=8,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _train(model: peft.PeftModel, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, steps + 1):
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
