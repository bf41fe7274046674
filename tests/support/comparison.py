"""A comparison in the size of a test."""

from pathlib import Path
from typing import Any

import yaml

from support.tiny_encoders import save_tiny_encoder, write_pairs
from support.tiny_run import save_tiny_model, write_rows

SPLITS = ("train", "a", "b")


def write_comparison(folder: Path, **changes: Any) -> Path:
    """Model, data and configuration in ``folder``: LoRA and the method, 12 steps of 8 examples."""
    save_tiny_model(folder / "model")
    rows = {name: str(write_rows(folder / f"{name}.jsonl", 30, seed)) for seed, name in enumerate(SPLITS)}
    return _write(folder, {"model": {"path": str(folder / "model")}}, rows, {}, changes)


def write_classification_comparison(folder: Path, numbers: bool = False, **changes: Any) -> Path:
    """Like :func:`write_comparison`, for an encoder that learns which pairs begin alike, or how alike they are."""
    # Its own dropout would make losses depend on how a batch is cut.
    save_tiny_encoder(folder / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tables = {
        name: {"path": str(write_pairs(folder / f"{name}.tsv", 30, seed, numbers)), "quotes": False}
        for seed, name in enumerate(SPLITS)
    }
    run = {"task": "sequence_classification", "model": {"path": str(folder / "model"), "quantization": "none"}}
    return _write(folder, run, tables, {"labels": "regression" if numbers else "classes"}, changes)


def _write(
    folder: Path, run: dict[str, Any], splits: dict[str, Any], data: dict[str, Any], changes: dict[str, Any]
) -> Path:
    config: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "run": {
            "preset": "paper",
            **run,
            "data": {"train": splits["train"], "cache_dir": str(folder / "cache"), **data},
            "adapter": {"dropout": 0.1},
            "pruning": {"interval": 2},
            "training": {
                "max_steps": 12,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "logging_steps": 1,
                "save_steps": 1,
            },
        },
        "tasks": {"echo": {"data": {"eval": splits["a"]}, "search": splits["b"]}},
        "methods": ["lora", "dynamic"],
        "budgets": [2],
        "seeds": [1, 2],
        "learning_rates": [0.003, 0.01],
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({**config, **changes}, sort_keys=False), encoding="utf-8")
    return path
