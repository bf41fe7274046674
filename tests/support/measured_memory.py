"""The peak memory of training steps on a CPU, in bytes: what ``torch.cuda.max_memory_allocated`` is on a GPU."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dora_dist import add_dynamic_lora
from dora_dist.adapter.components import stacks_of
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.load import BaseModelSpec, load_base_model
from dora_dist.base_model.recomputation import number_of_recomputed, recomputable_layers, recompute_first
from dora_dist.benchmark.peak import PeakMeter
from dora_dist.config.parse import load_config
from dora_dist.config.run import RunConfig
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.world import use_gloo_only
from dora_dist.method.budget import PARAMETERS, Budget, component_costs
from dora_dist.method.regularizer import penalty_of_stacks
from dora_dist.method.schedule import FixedRanks
from dora_dist.training.from_data.ranks import RankChoice, choose_ranks
from dora_dist.training.from_data.start import DataStart, start_from_data
from support.repository import REPOSITORY


def save_model(folder: Path, config: PreTrainedConfig) -> None:
    """A random model of this configuration, in the ordinary layout."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_run(path: Path, model: Path, rows: int, length: int) -> Path:
    """The configuration of a run on one process, with micro-batches of so many rows of so many tokens."""
    config = {
        "output_dir": "runs/x",
        "preset": "paper",
        "model": {"path": str(model)},
        "data": {"train": "train.jsonl", "max_length": length},
        "distributed": {"engine": "none"},
        "training": {"per_device_train_batch_size": rows},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def measure_peak(config: RunConfig, prepare: Callable[[DynamicLoraModel], None] = lambda _: None) -> int:
    """Peak of the second optimizer step of a run on one CPU, the resident tensors included.

    The step is the trainer's (``training_step`` of transformers and ``compute_loss`` of this project): forward with
    labels and ``num_items_in_batch``, equilibrium penalty, backward, gradient clipping, AdamW.

    Args:
        config: the run's configuration.
        prepare: function that changes the model before it is trained.
    """
    meter = PeakMeter()
    model = _load(config, "float32")
    prepare(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    # As accelerate wraps the forward where the compute dtype is bfloat16.
    autocast = model.dtype is torch.bfloat16

    def step() -> None:
        for _ in range(config.training.get("gradient_accumulation_steps", 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = _loss(model, model, config)
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return meter.of_second(step)


def measure_start(config: RunConfig) -> int:
    """Peak of a start from one row, as long as can be, on one CPU, the resident tensors included."""
    meter = PeakMeter()
    model = _load(replace(config, adapter=replace(config.adapter, init="lora")), "float32")
    start = DataStart(init=config.adapter.init, rows=(0,), seed=0)
    one_row = _one_row(config)
    return meter.of_second(lambda: start_from_data(model, lambda _: _loss(model, model, one_row), start, Agreement()))


def measure_rank_choice(config: RunConfig) -> int:
    """Like :func:`measure_start`, for ranks chosen from one row; all layers are one group."""
    meter = PeakMeter()
    slotted = copy.copy(config)  # a run would refuse its slots
    slotted.adapter = replace(config.adapter, ranks="uniform")
    model = _load(slotted, "float32")
    layers, target = model.adapted_layers(), config.adapter.target_rank
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    budget = Budget(FixedRanks(dict.fromkeys(layers, target)), component_costs(shapes, PARAMETERS))
    choice = RankChoice(ranks=config.adapter.ranks, rows=(0,), seed=0, target_rank=target, groups=[list(layers)])
    one_row = _one_row(config)
    return meter.of_second(
        lambda: choose_ranks(model, lambda _: _loss(model, model, one_row), choice, budget, Agreement())
    )


def _one_row(config: RunConfig) -> RunConfig:
    one_row = replace(config, training={**config.training, "per_device_train_batch_size": 1})
    one_row.pruning.equilibrium_weight = 0.0
    return one_row


def measure_zero_peak(path: str, overrides: list[str], bucket_numel: int) -> int:
    """Like :func:`measure_peak`, under DeepSpeed as launch/zero2.json configures it, but with reduction buckets of so
    many elements, on one rank of a world that has been joined."""
    import deepspeed

    use_gloo_only()
    config = load_config(path, overrides)
    meter = PeakMeter()
    model = _load(config, "auto")
    settings: dict[str, Any] = json.loads((REPOSITORY / "launch" / "zero2.json").read_text())
    settings["zero_optimization"]["reduce_bucket_size"] = bucket_numel
    rows, accumulation = _rows(config), config.training.get("gradient_accumulation_steps", 1)
    settings |= {
        "bf16": {"enabled": model.dtype is torch.bfloat16},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": rows,
        "train_batch_size": rows * accumulation * torch.distributed.get_world_size(),
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step() -> None:
        for _ in range(accumulation):
            loss = _loss(engine, model, config)
            engine.backward(loss)
            del loss
            engine.step()

    return meter.of_second(step)


def _load(config: RunConfig, adapter_dtype: str) -> DynamicLoraModel:
    """The model as ``build.load_model`` loads it, ready to train."""
    base = load_base_model(BaseModelSpec.of(config.model, config.task))
    model = add_dynamic_lora(base, replace(config.adapter, dtype=adapter_dtype), config.model.fuse)
    model.use_loss_without_logits()
    layers = recomputable_layers(model.get_base_model())
    recompute_first(model.get_base_model(), number_of_recomputed(config.model.recompute_layers or 0, layers, "it"))
    if config.adapter.start_rank > config.adapter.target_rank:
        # As after the first event.
        next(iter(model.adapted_layers().values())).component_mask[0] = False
    return model.train()


def _rows(config: RunConfig) -> int:
    return config.training["per_device_train_batch_size"]


def _loss(wrapped: nn.Module, model: DynamicLoraModel, config: RunConfig) -> Tensor:
    """The loss of a batch whose rows are all as long as can be, except that one is a token shorter, or that every row
    has two examples: attention needs a mask."""
    ids = torch.randint(0, model.config.vocab_size, (_rows(config), config.data.max_length))
    if config.data.batching == "packed":
        shape = {"position_ids": torch.arange(config.data.max_length // 2).repeat(_rows(config), 2)}
    else:
        shape = {"attention_mask": torch.ones_like(ids)}
        shape["attention_mask"][1:2, -1] = 0
    loss = wrapped(input_ids=ids, labels=ids, **shape, num_items_in_batch=torch.tensor(ids.numel())).loss
    weight = config.pruning.equilibrium_weight
    if weight:
        layers = list(model.adapted_layers().values())
        stacks = stacks_of(layers, layers[0].gathered)
        loss = loss + weight * penalty_of_stacks(stacks.rows, stacks.columns).to(loss.dtype)
    return loss
