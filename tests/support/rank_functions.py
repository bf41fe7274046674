"""What the ranks of the tests of several processes run (importable, so that a fresh process finds it)."""

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import Tensor, nn

from dora_dist.adapter.layer import DynamicLoraLinear
from dora_dist.distributed.agreement import Agreement, digest_tensors
from dora_dist.distributed.engine import scale_entries, zero_entries
from dora_dist.distributed.store_agreement import StoreAgreement
from dora_dist.distributed.world import host_group
from dora_dist.method.budget import Budget
from dora_dist.method.importance import LayerParameters, ScoreFunction, score_layers
from dora_dist.method.schedule import BudgetSchedule
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.criterion import SmoothedScores

NAMES = ("blocks.0.up", "blocks.0.down", "blocks.1.up")
RANK, TARGET = 6, 4


def make_layers(seed: int = 0) -> dict[str, DynamicLoraLinear]:
    """Three small layers with random components, the same on every rank."""
    layers = {}
    for name in NAMES:
        base = nn.Linear(8, 12, bias=False)
        layer = DynamicLoraLinear(base, "default", config=LoraConfig(), r=RANK, lora_alpha=RANK)
        layer.initialize("paper", seed, name, torch.float32)
        with torch.no_grad():
            layer.gate.copy_(torch.linspace(0.5, 1.5, RANK))
        layers[name] = layer
    return layers


def make_controller(layers: dict[str, DynamicLoraLinear], **options: Any) -> DynamicRankController:
    """A controller for ten optimizer steps, with events at steps 2, 4 and 6, the last one final."""
    schedule = BudgetSchedule(
        total_steps=10,
        num_layers=len(layers),
        initial_rank=RANK,
        target_rank=TARGET,
        warmup_fraction=0.2,
        final_fraction=0.4,
        interval=2,
    )
    return DynamicRankController(layers, Budget(schedule, dict.fromkeys(layers, 1)), Agreement(), **options)


def smoothed(score: ScoreFunction, layers: dict[str, DynamicLoraLinear]) -> SmoothedScores:
    """The paper's smoothing of another score."""
    return SmoothedScores(score, 0.9, [layers[name] for name in sorted(layers)])


def agreement_mean() -> tuple[Tensor, Tensor]:
    """A tensor that differs by rank, and its mean over the ranks."""
    torch.manual_seed(dist.get_rank())
    mine = torch.randn(1000, dtype=torch.float64)
    return mine, Agreement().mean(mine)


def agreement_failure(failing: int) -> None:
    agreement = Agreement()
    agreement.raise_together("out of memory" if agreement.rank == failing else None, "scoring")


def agreement_digests(odd_rank: int) -> None:
    agreement = Agreement()
    value = torch.ones(3) * (2 if agreement.rank == odd_rank else 1)
    agreement.check_equal({"first": b"same", "second": digest_tensors(value)}, "the test state")


def phase_that_fails(failing: list[int]) -> None:
    agreement = Agreement()
    with agreement.together("reading"):
        if agreement.rank in failing:
            raise OSError("no such file")


def prune_with_different_statistics() -> dict[str, Any]:
    """Each rank scores with a factor pattern of its own; returns what it fed and what was selected."""
    rank = dist.get_rank()

    def skewed(layers: Sequence[LayerParameters]) -> Tensor:
        generator = torch.Generator().manual_seed(rank)
        return score_layers(layers) * (0.2 + torch.rand(len(layers), RANK, generator=generator).double())

    layers = make_layers()
    controller = make_controller(layers, criterion=smoothed(skewed, layers))
    events = [controller.after_optimizer_step(step) for step in range(1, 7)]
    local = {name: scores.clone() for name, scores in controller.scores.items()}
    return {
        "local": local,
        "kept": events[-1].kept,
        "masks": {name: layer.component_mask.clone() for name, layer in layers.items()},
        "gates": {name: layer.gate.detach().clone() for name, layer in layers.items()},
    }


def prune_with_altered_adapter(odd_rank: int) -> None:
    layers = make_layers()
    controller = make_controller(layers)
    controller.after_optimizer_step(1)
    if dist.get_rank() == odd_rank:
        layers["blocks.0.up"].lora_b.data[0, 0] += 1e-3
    controller.after_optimizer_step(2)


def verify_altered_head(odd_rank: int) -> None:
    head = {f"classifier.{kind}": nn.Parameter(torch.zeros(3)) for kind in ("bias", "weight")}
    controller = make_controller(make_layers(), head=head)
    controller.verify("the adapter at the start")
    if dist.get_rank() == odd_rank:
        head["classifier.weight"].data[1] = 1e-3
    controller.verify("the adapter before the checkpoint")


def prune_with_altered_mask(odd_rank: int) -> None:
    layers = make_layers()
    controller = make_controller(layers)
    for step in range(1, 11):
        controller.after_optimizer_step(step)
    if dist.get_rank() == odd_rank:
        layers["blocks.1.up"].component_mask.logical_not_()
    controller.finish()


def prune_with_bad_scores(bad_rank: int, kind: str) -> None:
    """One rank has a NaN in its weights' scores, or fails while it scores; all are the same otherwise."""
    controller = _controller_with_bad_scores(bad_rank, kind)
    for step in range(1, 5):
        controller.after_optimizer_step(step)


def end_step_with_bad_scores(bad_rank: int) -> None:
    """One rank fails while it scores step 1, after which no event is due; then the Trainer ends that step."""
    from types import SimpleNamespace

    from transformers import TrainerControl

    from dora_dist.training.trainer import DynamicLoraTrainer

    controller = _controller_with_bad_scores(bad_rank, "raises")
    notice = SimpleNamespace(received=None)
    parts = SimpleNamespace(controller=controller, agreement=controller.agreement, notice=notice)
    trainer = SimpleNamespace(parts=parts, state=SimpleNamespace(global_step=1, max_steps=10))
    assert controller.after_optimizer_step(1) is None
    DynamicLoraTrainer.stop_early(trainer, TrainerControl())


def _controller_with_bad_scores(bad_rank: int, kind: str) -> DynamicRankController:
    def score(layers: Sequence[LayerParameters]) -> Tensor:
        scores = score_layers(layers)
        if dist.get_rank() == bad_rank:
            if kind == "raises":
                raise MemoryError("no memory left on this rank")
            scores[0, 2] = float(kind)
        return scores

    layers = make_layers()
    return make_controller(layers, criterion=smoothed(score, layers))


def check_world_of_one() -> None:
    """The Trainer believes that there is one process while the group has more: ranks would train on the same data."""
    from types import SimpleNamespace

    from dora_dist.distributed.world import check_world

    check_world(Agreement(), SimpleNamespace(world_size=1), SimpleNamespace(num_processes=1))


def check_same_data() -> None:
    """Every rank is given the same first batch."""
    from types import SimpleNamespace

    from dora_dist.distributed.world import _check_data_differs

    _check_data_differs(Agreement(), SimpleNamespace(batch_sampler=[[3, 1, 2]]))


def prune_under_engine(engine: str, model_folder: str) -> dict[str, Any]:
    """Train a tiny NF4 Llama under an engine, prune softly, go on, prune for good, go on; report what is seen."""
    model = _tiny_adapted(model_folder)
    layers = model.adapted_layers()
    step = _make_step(engine, model)
    batches = torch.Generator().manual_seed(dist.get_rank())
    layer = next(iter(layers.values()))
    pruned = torch.tensor([False, True, False, True])
    seen: dict[str, Any] = {}

    def train(steps: int) -> None:
        for _ in range(steps):
            step(torch.randint(4, 90, (2, 12), generator=batches))

    train(3)
    # In place alone: what a naive pruning would do.
    layer.gate.data[pruned] = 0
    train(1)
    seen["naive"] = layer.gate.detach().clone()
    # The soft prune: parameter and master copy.
    zero_entries(layer.gate, ~pruned)
    seen["soft_live"], seen["soft_master"] = layer.gate.detach().clone(), read_master(layer.gate).clone()
    train(1)
    seen["regrown"] = layer.gate.detach().clone()
    # The hard mask.
    zero_entries(layer.gate, ~pruned)
    layer.component_mask.copy_(~pruned)
    train(3)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.eval()
        seen["output"] = layer(x)
        kept = ~pruned
        delta = (x @ layer.lora_a[kept].T * (layer.gate[kept] * layer.scale)) @ layer.lora_b[:, kept].T
        seen["expected"] = layer.base_layer(x) + delta
        seen["hard_live"], seen["hard_master"] = layer.gate.detach().clone(), read_master(layer.gate).clone()
        layer.gate[pruned] = 1e3
        seen["output_with_huge_gates"] = layer(x)
        layer.gate[pruned] = 0
    # Another scale.
    columns = {"before": layer.lora_b.detach().clone(), "master before": read_master(layer.lora_b).clone()}
    scale_entries(layer.lora_b, 0.5)
    columns |= {"live": layer.lora_b.detach().clone(), "master": read_master(layer.lora_b).clone()}
    train(1)
    seen["columns"] = columns | {"a step later": layer.lora_b.detach().clone()}
    seen["engine"] = type(step.model).__name__
    return seen


def move_under_engine(engine: str, model_folder: str, train_gates: bool = True) -> dict[str, Any]:
    """Train a tiny NF4 Llama under an engine, mask a slot in every layer, let an event move a component of the
    first layer, go on; report what is seen of the last layer, which gets a component, and of the optimizer."""
    from dora_dist.distributed.engine import Moments
    from dora_dist.training.rules.move import Move

    model = _tiny_adapted(model_folder)
    layers = model.adapted_layers()
    for layer in layers.values():
        layer.gate.requires_grad_(train_gates)
    step = _make_step(engine, model)
    schedule = BudgetSchedule(total_steps=10, num_layers=len(layers), initial_rank=3, target_rank=3, interval=1)
    rule = Move(layers, Budget(schedule, dict.fromkeys(layers, 1)), num_moved=1, seed=7)
    batches = torch.Generator().manual_seed(dist.get_rank())

    def train(steps: int) -> None:
        for _ in range(steps):
            step(torch.randint(4, 90, (2, 12), generator=batches))

    def output() -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(4, 16)[None]).logits

    train(3)
    # Something to forget in the slots: weights and optimizer state, as a pruned component leaves them.
    for layer in layers.values():
        layer.component_mask[2] = False
    kept = {name: layer.component_mask.clone() for name, layer in layers.items()}
    first, last = min(layers), max(layers)
    scores = {name: torch.ones(4) for name in layers} | {last: torch.full((4,), 2.0)}
    scores[first] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    gone, grown = layers[first], layers[last]
    seen: dict[str, Any] = {"before": grown.lora_a.detach().clone(), "master before": read_master(grown.lora_a).clone()}
    seen["wanted"] = rule.select(4, scores, kept)
    without = gone.component_mask.clone()
    without[1] = False
    gone.component_mask.copy_(without)
    seen["output before"] = output()
    gone.component_mask.copy_(kept[first])
    rule.apply(4, kept, seen["wanted"], Moments(step.model, step.optimizer))
    seen["output after"] = output()
    seen["masks"] = {name: layer.component_mask.clone() for name, layer in layers.items()}
    seen["gate gone"] = gone.gate.detach().clone()
    for name in ("lora_a", "lora_b", "gate"):
        parameter = getattr(grown, name)
        seen[name], seen[f"{name} master"] = parameter.detach().clone(), read_master(parameter).clone()
        if parameter.requires_grad:
            moments = [_read_moment(step, parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")]
            seen[f"{name} moments"] = moments
    train(1)
    seen["trained"] = grown.lora_b.detach().clone()
    seen["first and last"] = first, last
    return seen


def grow_under_engine(engine: str, model_folder: str) -> dict[str, Any]:
    """Train a tiny NF4 Llama under an engine with one component and a reserve in every layer, let an event grant one
    layer its reserve, go on; report what is seen of this layer, of another, and of the optimizer."""
    from dora_dist.distributed.engine import MASTER, Moments, deepspeed_of, owned_parts
    from dora_dist.method.schedule import GrowthSchedule
    from dora_dist.training.rules.grow import Grow

    model = _tiny_adapted(model_folder)
    layers = model.adapted_layers()
    kept = {name: torch.tensor([True, False, False, False]) for name in layers}
    for layer in layers.values():
        layer.component_mask[1:] = False
        layer.lora_b.data[:, 1:] = 0
    schedule = GrowthSchedule(total_steps=40, num_layers=len(layers), initial_rank=1, target_rank=2, interval=4)
    rule = Grow(layers, Budget(schedule, dict.fromkeys(layers, 1)), warmup=4)
    rule.begin(kept)
    step, number = _make_step(engine, model), 0
    granted, other = layers[max(layers)], layers[min(layers)]
    watched = {"lora_a": granted.lora_a, "lora_b": granted.lora_b, "gate": granted.gate, "other gate": other.gate}
    raw: dict[str, tuple[int, Tensor]] = {}

    def look(*_: object) -> None:  # what the optimizer has made, before anything is brought back
        for name, parameter in watched.items():
            part = owned_parts(step.model, {name: parameter}).get(name) if engine.startswith("zero2") else None
            if part is not None or not engine.startswith("zero2"):
                value = parameter.data.flatten() if part is None else part.tensors[MASTER]
                raw[name] = (0 if part is None else part.start, value.clone())

    inner = deepspeed_of(step.model).optimizer.optimizer if engine.startswith("zero2") else step.optimizer
    inner.register_step_post_hook(look)
    moments = Moments(step.model, step.optimizer)
    moments.slow_down(lambda: rule.rates(number + 1, kept))
    batches = torch.Generator().manual_seed(dist.get_rank())

    def train(steps: int) -> None:
        nonlocal number
        for _ in range(steps):
            step(torch.randint(4, 90, (2, 12), generator=batches))
            number += 1

    def state() -> dict[str, Tensor]:
        found = {}
        for name, parameter in watched.items():
            found |= {name: parameter.detach().clone(), f"{name} master": read_master(parameter).clone()}
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {key}"] = _read_moment(step, parameter, key).clone()
        return found

    def output() -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(4, 16)[None]).logits

    train(3)
    seen: dict[str, Any] = {"before": state(), "output before": output()}
    chosen = {**kept, max(layers): torch.tensor([True, True, False, False])}
    rule.apply(number, kept, chosen, moments)
    kept = chosen
    seen |= {"output after": output(), "granted": state()}
    train(1)
    return seen | {"a step later": state(), "raw": raw}


def _read_moment(step: Any, parameter: nn.Parameter, key: str) -> Tensor:
    """A moment of Adam, whole (a collective under ZeRO)."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state = step.optimizer.state.get(parameter)
    return state[key] if state else safe_get_full_optimizer_state(parameter, key)


def score_by_ablation(failing: int | None = None) -> dict[str, Tensor]:
    """Both kinds of scores of a tiny model on five rows; ``failing`` is a rank that cannot read them."""
    from dora_dist.training.rules.ablation import ablation_gradient_scores, ablation_scores
    from support.tiny_models import adapt, shake, tiny_model, tokens

    agreement, model = Agreement(), shake(adapt(tiny_model(num_hidden_layers=1), initial_rank=2))
    layers = list(model.adapted_layers().values())

    def loss(number: int) -> Tensor:
        if agreement.rank == failing:
            raise OSError("no such row")
        ids = tokens(1, 8 + number, seed=number)
        return model(input_ids=ids, labels=ids).loss

    losses = [lambda number=number: loss(number) for number in range(5)]
    return {
        "exact": ablation_scores(model, layers, losses, agreement),
        "gradient": ablation_gradient_scores(model, layers, losses, agreement),
    }


def read_master(parameter: nn.Parameter) -> Tensor:
    """The values that the optimizer will step from: ZeRO's float32 master copy (a collective), or else the
    parameter."""
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    return parameter.detach() if master is None else master


def skip_under_engine(engine: str, model_folder: str, bad: str | None) -> dict[str, Any]:
    """Train under an engine with a step in the middle in which the last rank's loss, or a gradient of it, is bad;
    report what the optimizer changed in that step and around it.

    Args:
        engine: ``none``, ``ddp``, ``zero2`` or ``zero2 in bfloat16``.
        model_folder: folder of the base.
        bad: ``loss`` (times NaN), ``gradient`` (one infinite element) or None.
    """
    from dora_dist.distributed.engine import SkippedSteps

    model = _tiny_adapted(model_folder)
    step = _make_step(engine, model)
    skipped = SkippedSteps(step.model, step.optimizer)
    batches = torch.Generator().manual_seed(dist.get_rank())
    watched = next(iter(model.adapted_layers().values())).lora_b
    spoils = dist.get_rank() == dist.get_world_size() - 1
    seen = []
    for number in range(4):
        before = watched.detach().clone()
        now = bad if number == 2 and spoils else None
        handle = watched.register_hook(lambda gradient: gradient + torch.inf) if now == "gradient" else None
        step(torch.randint(4, 90, (2, 12), generator=batches), torch.nan if now == "loss" else 1.0)
        if handle:
            handle.remove()
        seen.append((skipped.last(), not torch.equal(before, watched)))
    return {"seen": seen, "weights": watched.detach().clone()}


def save_optimizer(model_folder: str, folder: str, steps: int, engine: str = "zero2") -> dict[str, Tensor]:
    """Train a little under ZeRO-2 and save the optimizer's state; returns it, gathered."""
    from dora_dist.training.optimizer_shards import OptimizerShards

    model = _tiny_adapted(model_folder)
    step = _make_step(engine, model)
    for number in range(steps):
        step(torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(number)))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    OptimizerShards(step.model, trained, Agreement()).save(Path(folder))
    return _whole_states(trained)


def load_optimizer(model_folder: str, folder: str, engine: str = "zero2") -> dict[str, Any]:
    """Load the state into a fresh engine."""
    from dora_dist.training.optimizer_shards import OptimizerShards

    model = _tiny_adapted(model_folder)
    step = _make_step(engine, model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    OptimizerShards(step.model, trained, Agreement()).load(Path(folder), 3)
    counts = [float(state["step"]) for state in step.model.optimizer.optimizer.state.values()]
    step.model.optimizer._lazy_init_hp_params_optimizer_state()
    return {"states": _whole_states(trained), "counts": counts, "steps": step.model.global_steps}


def check_odd_optimizer(model_folder: str) -> None:
    """Check an optimizer whose state has 8 bits."""
    from dora_dist.training.optimizer_shards import OptimizerShards

    model = _tiny_adapted(model_folder)
    step = _make_step("zero2", model)
    step(torch.randint(4, 90, (2, 12)))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for state in step.model.optimizer.optimizer.state.values():
        state["state1"] = torch.zeros(state["exp_avg"].numel(), dtype=torch.uint8)
    OptimizerShards(step.model, trained, Agreement()).check()


def _whole_states(trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """All of every parameter's state, gathered by DeepSpeed's own functions (collectives)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole = {}
    for name, parameter in trained.items():
        whole[f"{name}:master"] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            whole[f"{name}:{key}"] = safe_get_full_optimizer_state(parameter, key)
    return whole


def _tiny_adapted(model_folder: str) -> Any:
    """A tiny NF4 Llama with an adapter whose every component has an effect, the same on every rank."""
    from dora_dist import DynamicLoraConfig, add_dynamic_lora
    from support.tiny_models import load_base

    config = DynamicLoraConfig(target_rank=2, initial_rank=4, dropout=0.0, alpha=8)
    model = add_dynamic_lora(load_base(model_folder), config)
    for layer in model.adapted_layers().values():
        nn.init.normal_(layer.lora_b, std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def _make_step(engine: str, model: nn.Module) -> Any:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    if engine.startswith("zero2"):
        import deepspeed

        from dora_dist.distributed.world import use_gloo_only

        os.environ["MASTER_PORT"] = "29500"
        use_gloo_only()
        wrapped, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 1.0,
                "bf16": {"enabled": engine == "zero2 in bfloat16"},
            },
        )

        def step(ids: Tensor, factor: float = 1.0) -> None:
            wrapped.backward(wrapped(input_ids=ids, labels=ids).loss * factor)
            wrapped.step()

    else:
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if engine == "ddp" else model

        def step(ids: Tensor, factor: float = 1.0) -> None:
            optimizer.zero_grad()
            (wrapped(input_ids=ids, labels=ids).loss * factor).backward()
            optimizer.step()

    step.model, step.optimizer = wrapped, optimizer
    return step


def agreement_any(flagged: list[int]) -> bool:
    agreement = Agreement()
    return agreement.any(agreement.rank in flagged)


def smallest_of_cards(sizes: list[int | None]) -> int | None:
    """The size that ranks agree on whose GPUs have these sizes; this machine has none of them."""
    from dora_dist.setup import recomputation

    recomputation.card_bytes = lambda _: sizes[dist.get_rank()]
    return recomputation.smallest_card(Agreement())


def host_exchanges(flagged: list[int]) -> dict[str, Any]:
    """The exchanges that ranks make from host memory, beside a process group that may serve no CPU."""
    group = host_group(timedelta(seconds=20))
    agreement = Agreement("cpu", host_group=group)
    with agreement.together("resting"):
        pass
    return {
        "any": agreement.any(agreement.rank in flagged),
        "gather": agreement.gather(agreement.rank),
        "a group of its own": group is not None,
    }


def sum_in_host_memory() -> None:
    """An all-reduce of the process group itself."""
    dist.all_reduce(torch.zeros(1))


def host_group_over(interface: str) -> None:
    """A group for host memory over a network interface."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    host_group(timedelta(seconds=5))


def host_exchange_without_a_rank(absent: int) -> None:
    """An exchange from which one rank stays away."""
    agreement = Agreement("cpu", host_group=host_group(timedelta(seconds=1)))
    if agreement.rank == absent:
        time.sleep(5)
    else:
        agreement.any(False)


def agreement_sum() -> Tensor:
    """The result of add_up for a tensor that differs by rank."""
    agreement = Agreement()
    tensor = torch.arange(4, dtype=torch.float32) * (agreement.rank + 1)
    agreement.add_up(tensor)
    return tensor


def agreement_first() -> Tensor:
    """The result of take_first for a tensor that differs by rank."""
    agreement = Agreement()
    tensor = torch.arange(4, dtype=torch.float64) + agreement.rank
    agreement.take_first(tensor)
    return tensor


def start_from_rows(init: str, failing: int | None = None) -> dict[str, Tensor]:
    """Rows a_i and columns b_i of a tiny model after its start from 7 training rows; ``failing`` is a rank that cannot
    read any of them."""
    from dora_dist.training.from_data.start import DataStart, start_from_data
    from support.tiny_models import adapt, tiny_model, tokens

    agreement, model, one = Agreement(), adapt(tiny_model()), torch.ones(())

    def loss(number: int) -> Tensor:
        if agreement.rank == failing:
            raise OSError("no such row")
        ids = tokens(1, 8 + number, seed=number)
        return model(input_ids=ids, labels=ids, num_items_in_batch=one).loss

    start_from_data(model, loss, DataStart(init=init, rows=range(7), seed=2), agreement)
    layers = model.adapted_layers().items()
    return {
        name: torch.cat([layer.lora_a.detach().flatten(), layer.lora_b.detach().flatten()]) for name, layer in layers
    }


def ranks_from_rows(ranks: str) -> dict[str, int]:
    """Number of components of every layer of a tiny model, chosen from 7 training rows; the controller verifies
    them."""
    from dora_dist.method.budget import PARAMETERS, Budget, component_costs
    from dora_dist.method.schedule import FixedRanks
    from dora_dist.training.controller import DynamicRankController
    from dora_dist.training.from_data.ranks import RankChoice, choose_ranks
    from support.tiny_models import adapt, tiny_model, tokens

    agreement, model, one = Agreement(), adapt(tiny_model(), initial_rank=2, slots=6), torch.ones(())
    layers = model.adapted_layers()
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    budget = Budget(FixedRanks(dict.fromkeys(layers, 2)), component_costs(shapes, PARAMETERS))

    def loss(number: int) -> Tensor:
        ids = tokens(1, 8 + number, seed=number)
        return model(input_ids=ids, labels=ids, num_items_in_batch=one).loss

    groups = [[name] for name in layers]
    choice = RankChoice(ranks=ranks, rows=range(7), seed=2, target_rank=2, groups=groups)
    controller = DynamicRankController(layers, budget, agreement)
    controller.fix_ranks(choose_ranks(model, loss, choice, budget, agreement))
    controller.finish()
    return controller.ranks


def store_gathers() -> list[list[Any]]:
    """Two gathers through the store, one after the other, and a phase that all ranks pass."""
    agreement = StoreAgreement("cpu", timeout_seconds=30)
    gathered = [agreement.gather(("first", agreement.rank)), agreement.gather(agreement.backend)]
    with agreement.together("resting"):
        pass
    agreement.close()
    return gathered


def store_gather_without(absent: list[int]) -> None:
    agreement = StoreAgreement("cpu", timeout_seconds=0.5)
    if agreement.rank not in absent:
        agreement.gather(agreement.rank)


def store_phase_that_fails(failing: int) -> None:
    agreement = StoreAgreement("cpu", timeout_seconds=30)
    with agreement.together("looking"):
        if agreement.rank == failing:
            raise OSError("no such file")


def load_and_watch(tiny: str, folder: str, quantization: str, dtype: str, hoard: bool) -> dict[str, int]:
    """Memory, in bytes, that loading a base takes on this rank while the others load it too.

    Args:
        tiny: folder of another base, loaded before, so that what is imported on first use is not counted.
        folder: folder of the base.
        quantization: quantization of the base.
        dtype: dtype to compute in.
        hoard: whether to hold all weights as they are stored, too, like a loader that reads first and quantizes then.
    """
    from many_shards import size_of_model
    from process_memory import MemoryWatch
    from safetensors.torch import load_file

    from support.tiny_models import load_base

    load_base(tiny, quantization, getattr(torch, dtype))
    dist.barrier()
    with MemoryWatch() as watch:
        files = sorted(Path(folder).glob("*.safetensors")) if hoard else []
        stored = [{name: value.clone() for name, value in load_file(path).items()} for path in files]
        model = load_base(folder, quantization, getattr(torch, dtype))
        del stored
    return {"resident": watch.resident, "own": watch.anonymous, "kept": watch.kept, "model": size_of_model(model)}


def load_where_one_is_broken(folder: str, broken: str) -> None:
    """The last rank's base has a flaw."""
    from support.tiny_models import load_base

    agreement = Agreement()
    with agreement.together("loading the model"):
        load_base(broken if agreement.rank == agreement.size - 1 else folder)


def start_alike(
    folder: str, odd: int, odd_folder: str, odd_settings: dict[str, Any], odd_kernels: tuple[str, ...] = ()
) -> None:
    """The comparison that a run makes before its first step; one rank has a base, settings and kernels of its own."""
    from dora_dist.base_model.kernels import KernelsInUse
    from dora_dist.base_model.recomputation import Recomputation
    from dora_dist.setup.build import check_same_on_all_ranks
    from support.tiny_models import adapt, load_base
    from support.tiny_run import some_fingerprint

    agreement = Agreement()
    is_odd = agreement.rank == odd
    model = adapt(load_base(odd_folder if is_odd else folder))
    model.kernels = KernelsInUse(odd_kernels if is_odd else ())
    fingerprint = some_fingerprint(**(odd_settings if is_odd else {}))
    check_same_on_all_ranks(agreement, fingerprint, Recomputation(0, 2), model)


def route_share(shares: list[list[int]]) -> dict[str, Any]:
    """Route this rank's rows of one batch. Returns the decisions, the balancing loss of all ranks, and the gradients
    that an engine computes from it."""
    from dora_dist.data.encoding.encoder import IGNORED
    from support.tiny_models import decisions, routed, tokens

    agreement = Agreement()
    ids = tokens(rows=4)[shares[agreement.rank]]
    labels = ids.clone()
    labels[:, :5] = IGNORED
    model = routed()
    model(input_ids=ids, labels=labels)
    loss = model.balance_loss(agreement)
    loss.backward()
    gradients = {name: agreement.mean(parameter.grad) for name, parameter in model.head_parameters().items()}
    probabilities = torch.stack([decision.probabilities.detach() for decision in decisions(model)])
    return {"probabilities": probabilities, "loss": loss.item(), "gradients": gradients}


def accumulate_under_zero2(micro_batches: int) -> dict[str, Tensor]:
    """The gradient that ZeRO-2's optimizer gets in bfloat16, as launch/zero2.json configures it, and the sum of the
    same micro-batches' gradients in float32."""
    import json

    import deepspeed

    from dora_dist.distributed.world import use_gloo_only
    from support.repository import REPOSITORY

    os.environ["MASTER_PORT"] = "29500"
    use_gloo_only()
    torch.manual_seed(0)
    model, single = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    single.load_state_dict(model.state_dict())
    single.bfloat16()
    settings = json.loads((REPOSITORY / "launch" / "zero2.json").read_text())
    settings |= {
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": micro_batches,
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 2 * micro_batches,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    seen: dict[str, Tensor] = {"expected": torch.zeros(64, 64)}
    engine.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.update(found=optimizer.param_groups[0]["params"][0].grad.clone().view(64, 64))
    )
    for _ in range(micro_batches):
        rows = torch.randn(2, 64).bfloat16()
        (single(rows).float().pow(2).mean() / micro_batches).backward()
        seen["expected"] += single.weight.grad.float()
        single.weight.grad = None
        engine.backward(engine(rows).float().pow(2).mean())
        engine.step()
    return seen
