"""Seconds of a step in whole runs: this project's command, and TRL's SFTTrainer with PEFT's LoRA of the same rank on
the same base, rows, dropout and checkpointing.

    python benchmarks/run_beside_trl.py FOLDER make --shape 8b --device cuda   # a random base, rows, run.yaml
    python benchmarks/run_beside_trl.py FOLDER ours
    python benchmarks/run_beside_trl.py FOLDER trl                             # where trl is installed

The last line of each is JSON: the median of the steps after the first two, and on a GPU TRL's peak of the allocator.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

STEPS, UNTIMED, ROWS, ACCUMULATION = 10, 2, 4, 2
RANK, TARGET_RANK, DROPOUT = 12, 8, 0.05


def make(folder: Path, shape_name: str, device: str) -> None:
    """Write the base, a tokenizer of one token a word, rows that fill a sequence, and the configuration of the run."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from dora_dist.benchmark.shapes import parse_shape
    from dora_dist.benchmark.synthetic_base import llama_config

    shape = parse_shape(shape_name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = llama_config(shape)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    torch.set_default_dtype(dtype)
    with torch.device(device):
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(shape.vocabulary - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, shape.vocabulary, (STEPS * ROWS * ACCUMULATION, shape.sequence - 2), generator=generator)
    lines = (json.dumps({"text": " ".join(words[token] for token in row)}) for row in rows.tolist())
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "quantization": "nf4"},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": shape.sequence, "cache_dir": str(folder / "cache")},
        "adapter": {"target_rank": TARGET_RANK, "initial_rank": RANK, "dropout": DROPOUT},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "save_steps": 100,
            "report_to": "none",
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")


def time_ours(folder: Path) -> dict[str, Any]:
    """Figures of ``dora-dist train``, which starts a rank for every GPU."""
    subprocess.run([sys.executable, "-m", "dora_dist", "train", str(folder / "run.yaml")], check=True)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]}


def time_trl(folder: Path) -> dict[str, Any]:
    """Figures of TRL's trainer in this process, on one GPU or the CPU."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from dora_dist.base_model.quantization import quantization_config

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    run = yaml.safe_load((folder / "run.yaml").read_text())
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            folder / "model",
            quantization_config=quantization_config("nf4", dtype),
            dtype=dtype,
            device_map={"": "cuda:0" if gpu else "cpu"},
        ),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            **{**run["training"], "save_strategy": "no", "bf16": gpu, "use_cpu": not gpu},
            max_length=run["data"]["max_length"],
        ),
        train_dataset=load_dataset("json", data_files=run["data"]["train"], cache_dir=str(folder / "trl"))["train"],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=RANK, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    found = {"seconds": [end - begin for begin, end in pairwise(ends)]}
    return {**found, "peak_bytes": torch.cuda.max_memory_allocated()} if gpu else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("make", "ours", "trl"))
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder.resolve(), options.shape, options.device)
        return
    found = (time_ours if options.what == "ours" else time_trl)(options.folder.resolve())
    print(json.dumps({"what": options.what, "median": statistics.median(found["seconds"][UNTIMED:]), **found}))


if __name__ == "__main__":
    main()
