"""A comparison in the size of a test."""

from pathlib import Path
from typing import Any

import yaml
from tiny_run import save_tiny_model, write_rows


def write_comparison(folder: Path, **changes: Any) -> Path:
    """Model, data and configuration in ``folder``: LoRA and the method, 12 steps of 8 examples."""
    save_tiny_model(folder / "model")
    rows = {name: str(write_rows(folder / f"{name}.jsonl", 30, seed)) for seed, name in enumerate(("train", "a", "b"))}
    config: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "run": {
            "model": {"path": str(folder / "model")},
            "data": {"train": rows["train"], "cache_dir": str(folder / "cache")},
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
        "tasks": {"echo": {"data": {"eval": rows["a"]}, "search": rows["b"]}},
        "methods": ["lora", "dynamic"],
        "budgets": [2],
        "seeds": [1, 2],
        "learning_rates": [0.003, 0.01],
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({**config, **changes}, sort_keys=False), encoding="utf-8")
    return path
