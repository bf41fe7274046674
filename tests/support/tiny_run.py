"""Everything a run needs, in the size of a test: a model folder with tokenizer, data files, a configuration."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dora_dist.runs.fingerprint import Fingerprint
from support.tiny_models import VOCABULARY, tiny_model

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = ["Instruction", "Input", "Response", "###", ":", *(f"w{n}" for n in range(VOCABULARY - len(SPECIAL) - 5))]


def save_tiny_model(folder: Path) -> Path:
    """A random Llama with a word-level tokenizer, in the ordinary layout; the same weights each time."""
    model = tiny_model(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(5)  # at transformers' initial size the output hardly depends on the input
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words split at white space; everything else is unknown."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Write Alpaca rows of one to eight words; the answer repeats the input."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        words = " ".join(f"w{source.randrange(40)}" for _ in range(source.randint(1, 8)))
        rows.append({"instruction": "w1 w2", "input": words, "output": words})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write model, data and configuration of a run of 12 steps of 8 examples into ``folder``; events after steps 2, 4
    and 6."""
    save_tiny_model(folder / "model")
    data = {
        "train": str(write_rows(folder / "train.jsonl", 50, seed=1)),
        "eval": str(write_rows(folder / "eval.jsonl", 10, seed=2)),
    }
    return write_run(folder, {"data": data}, sections)


def some_fingerprint(**changes: Any) -> Fingerprint:
    """A fingerprint for tests in which its values do not matter."""
    values: dict[str, Any] = {
        "task": "causal_lm",
        "seed": 1,
        "engine": "zero2",
        "num_steps": 10,
        "global_batch": 16,
        "initial_rank": 6,
        "batching": "padded",
        "data_order": "same",
        "model": {"path": "base", "quantization": "nf4", "compute_dtype": "torch.float32"},
        "adapter": {"target_modules": ["q_proj"]},
        "pruning": {"smoothing": 0.9},
        "training": {"learning_rate": 1e-3},
        "examples": {"train": "50, 0123456789abcdef"},
    }
    return Fingerprint(**{**values, **changes})


def write_run(folder: Path, *layers: Mapping[str, Any]) -> Path:
    """Write the configuration of such a run, of a model in ``folder``; later layers of sections win, key by key."""
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "preset": "paper",  # events over half of the run, and no time for a start from data
        "seed": 3,
        "model": {"path": str(folder / "model")},
        "data": {"cache_dir": str(folder / "cache")},
        "adapter": {"target_rank": 2, "initial_rank": 4, "dropout": 0.0, "alpha": 4},
        "pruning": {"interval": 2},
        "evaluation": {"before": False},
        "checkpoint": {"keep_last": 20},
        "training": {
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 1,
            "report_to": "none",
        },
    }
    for sections in layers:
        for name, values in sections.items():
            config[name] = {**config.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
