"""Peak memory and time of the loss with a long vocabulary: from logits (before), and by chunks of positions (after).

    python benchmarks/long_vocabulary.py

A step is a forward and backward of a random one-layer LLaMA with an adapter, in float32 on the CPU: with the model's
own loss, and after ``use_loss_without_logits``. Both take turns (A B, B A, ...); the ratio is the median of the paired
ones. Peaks are those of the allocator's events within a step, above what was allocated before it. A share of the labels
is ignored, as those of prompts are.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_dist import DynamicLoraConfig, add_dynamic_lora
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.benchmark.peak import rise_of_allocator
from dora_dist.console.provenance import environment

HIDDEN, ROWS, LENGTH = 512, 4, 256
CASES = ((131072, 0.0, 2), (131072, 0.5, 2), (32768, 0.0, 3), (4096, 0.0, 9), (512, 0.0, 25))
"""Vocabulary, share of ignored labels, turns."""
PACKAGES = ("torch", "transformers", "peft")


def make_model(vocabulary: int) -> DynamicLoraModel:
    """A model with one decoder layer as small as it can be, so that the loss is what is measured."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=8,
        tie_word_embeddings=True,
        use_cache=False,
    )
    base = LlamaForCausalLM(config).requires_grad_(False)
    return add_dynamic_lora(base, DynamicLoraConfig(target_rank=8)).train()


def measure(vocabulary: int, ignored: float, turns: int) -> dict[str, Any]:
    """Peaks in bytes, seconds of each turn, and the difference of the losses."""
    model = make_model(vocabulary)
    ids = torch.randint(0, vocabulary, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, : int(ignored * LENGTH)] = -100
    items = torch.tensor(int((labels != -100).sum()))

    def step() -> float:
        torch.manual_seed(1)  # the same dropout
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    assert model.use_loss_without_logits() is None
    chunked = model._chunked_loss
    peaks, losses, seconds = {}, {}, {"before": [], "after": []}
    ways = {"before": None, "after": chunked}
    for name, way in ways.items():
        model._chunked_loss = way
        with rise_of_allocator() as found:
            losses[name] = step()
        peaks[name] = found.peak
    for turn in range(turns):
        for name in ways if turn % 2 == 0 else reversed(ways):
            model._chunked_loss = ways[name]
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    return {
        "vocabulary": vocabulary,
        "ignored": ignored,
        "peak_bytes": peaks,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "relative_difference_of_losses": abs(losses["after"] / losses["before"] - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "long_vocabulary.json")
    options = parser.parse_args()
    load, where = os.getloadavg(), environment(PACKAGES)
    print(f"hidden {HIDDEN}, {ROWS} x {LENGTH} tokens; peak MiB and ms of a step, before -> after")
    cases = []
    for case in CASES:
        found = measure(*case)
        cases.append(found)
        peaks, times = found["peak_bytes"], found["median_seconds"]
        print(
            f"{found['vocabulary']:>7,} words, {found['ignored']:.0%} ignored: "
            f"{peaks['before'] / 2**20:8.1f} -> {peaks['after'] / 2**20:6.1f} MiB   "
            f"{1000 * times['before']:8.1f} -> {1000 * times['after']:8.1f} ms (x {found['time_ratio']:.2f})   "
            f"losses {found['relative_difference_of_losses']:.0e} apart",
            flush=True,
        )
    result = {
        "command": "python benchmarks/long_vocabulary.py",
        "hidden": HIDDEN,
        "rows": ROWS,
        "length": LENGTH,
        "dtype": "float32",
        "cases": cases,
        "load_average_before": load,
        "environment": where,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
