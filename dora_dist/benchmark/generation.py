"""Measures generation with an adapter that is not merged, as on a server with many adapters. At the same number of
parameters, the number of adapted modules per block varies: fewer modules need fewer operations per token."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from dora_dist.base_model.copies import share
from dora_dist.benchmark.options import FLOOR, Options
from dora_dist.benchmark.paired import paired_ratios, spread, turns
from dora_dist.benchmark.peak import clock
from dora_dist.benchmark.shapes import Shape
from dora_dist.benchmark.synthetic_base import build_base, random_rows
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.modules import select_modules

MODULES = (7, 3, 1)
"""Numbers of adapted modules in every block, of seven."""
PROMPT, GENERATED = 32, 32
"""Number of tokens in a row."""
QUICK_GENERATED = 2


def measure_generation(shape: Shape, options: Options, agreement: Agreement) -> dict[str, Any]:
    """Tokens per second for one row, greedy, with a cache: for the frozen base, and for adapters of stock PEFT. One
    adapter has rank ``target_rank`` in all modules. The others spend the same parameters on fewer modules, which the
    seed selects."""
    device = agreement.device
    say(f"{shape.name}: a random base in NF4")
    base = build_base(shape, device, getattr(torch, options.compute_dtype), options.seed).eval()
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    costs = {name: _cost(base.get_submodule(name)) for name in names}
    budget = options.target_rank * sum(costs.values())
    generator = torch.Generator().manual_seed(options.seed)
    scores = {name: torch.rand(1, generator=generator) for name in names}
    plans = {f"{number} a block": select_modules(scores, costs, budget, number) for number in MODULES}
    models: dict[str, LlamaForCausalLM | peft.PeftModel] = {FLOOR: share(base)}
    models |= {name: _with_lora(share(base), plan) for name, plan in plans.items()}
    count = QUICK_GENERATED if options.quick else GENERATED
    generating = {name: partial(_generate, model, count=count) for name, model in models.items()}
    seconds = _in_turns(generating, partial(random_rows, shape, device, options.seed, 0), options, device)
    contestants = {}
    for name, times in seconds.items():
        plan = plans.get(name, {})
        contestants[name] = {
            "adapted_modules": len(plan),
            "adapter_parameters": sum(costs[layer] * rank for layer, rank in plan.items()),
            "seconds": spread(times),
            "tokens_per_second": count / spread(times)["median"],
            "to_floor": spread(paired_ratios(times, seconds[FLOOR])),
            "times": times,
        }
    return {
        "shape": shape.name,
        "layers": shape.layers,
        "prompt": min(PROMPT, shape.sequence),
        "generated": count,
        "contestants": contestants,
    }


def generation_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of a table."""
    rows = [["shape", "contestant", "adapted modules", "parameters", "tokens/s", "time to floor"]]
    for record in records:
        for name, figures in record["contestants"].items():
            row = [record["shape"], name, str(figures["adapted_modules"]), f"{figures['adapter_parameters']:,}"]
            rows.append([*row, f"{figures['tokens_per_second']:.1f}", f"{figures['to_floor']['median']:.3f}"])
    return rows


def _cost(module: nn.Module) -> int:
    assert isinstance(module, nn.Linear)
    return module.in_features + module.out_features


def _with_lora(model: LlamaForCausalLM, plan: Mapping[str, int]) -> peft.PeftModel:
    """The model with an adapter of these ranks, as stock PEFT loads it."""
    config = peft.LoraConfig(r=max(plan.values()), rank_pattern=dict(plan), target_modules=list(plan))
    adapted = peft.get_peft_model(model, config)
    assert isinstance(adapted, peft.PeftModel)
    return adapted.eval()


@torch.inference_mode()
def _generate(model: Any, prompt: Tensor, count: int) -> None:  # Any, because PEFT's types lack generate
    generated = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    assert generated.shape[1] == prompt.shape[1] + count


def _in_turns(
    generating: Mapping[str, Callable[[Tensor], None]],
    rows: Callable[[int], Tensor],
    options: Options,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds of every round by contestant; in each round, all continue the same prompt."""
    now = clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in generating}
    for number in tqdm(range(options.warmup + options.rounds), desc="rounds", leave=False, disable=None):
        prompt = rows(number)[:1, :PROMPT]
        for name in turns(list(generating), number):
            began = now()
            generating[name](prompt)
            if number >= options.warmup:
                seconds[name].append(now() - began)
    return seconds
