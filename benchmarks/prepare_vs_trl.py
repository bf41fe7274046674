"""Time to encode instruction rows: this project against TRL's SFT preprocessing of the same rows.

    pip install --no-deps trl==1.16.0
    python benchmarks/prepare_vs_trl.py ROWS TOKENIZER --repeat 5

ROWS is a file of alpaca rows, TOKENIZER a folder or Hub name. Each contestant runs in a process of its own, in turns
(A B A B ...), with two workers and an empty cache. TRL is given prompt and completion ready-made in memory, and only
its preprocessing is timed; this project's time is that of all of ``prepare``: reading and checking the rows,
rendering, encoding, and writing the result.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORKERS = 2
MAX_LENGTH = 4096
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "trl")


def time_ours(rows: Path, tokenizer_path: str) -> dict[str, float]:
    """Seconds of reading, checking, encoding and writing."""
    from dora_dist.base_model.load import load_tokenizer
    from dora_dist.config.data import DataConfig
    from dora_dist.setup.run_data import prepare_data

    tokenizer = load_tokenizer(tokenizer_path)
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(train=str(rows), max_length=MAX_LENGTH, workers=WORKERS, cache_dir=cache, bad_rows="skip")
        started = time.perf_counter()
        counts = prepare_data(config, tokenizer).train[0].counts
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "examples": counts.examples, "tokens": counts.tokens}


def time_trl(rows: Path, tokenizer_path: str) -> dict[str, float]:
    """Seconds of ``SFTTrainer``'s preparation of a data set that is in memory already."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from dora_dist.base_model.load import load_tokenizer
    from dora_dist.data.reading.files import read_file
    from dora_dist.data.row_formats import FORMATS

    datasets.disable_caching()
    tokenizer = load_tokenizer(tokenizer_path)
    parse = FORMATS["alpaca"].parse
    pairs = [parse_pair(parse, raw.json) for raw in read_file(rows)]
    dataset = datasets.Dataset.from_list([pair for pair in pairs if pair is not None])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, dataset_num_proc=WORKERS, max_length=MAX_LENGTH, report_to=[], use_cpu=True
        )
        started = time.perf_counter()
        trainer = SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
        seconds = time.perf_counter() - started
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {"seconds": seconds, "examples": len(trainer.train_dataset), "tokens": tokens}


def parse_pair(parse: Any, text: str) -> dict[str, str] | None:
    """A row in TRL's form; None for one that neither contestant would be given."""
    from dora_dist.data.reading.samples import RowFlaw

    try:
        pair = parse(json.loads(text)).as_pair()
    except RowFlaw:
        return None
    return {"prompt": pair.prompt, "completion": pair.completion}


def run_contestant(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One timing in a fresh process, with a cache folder of its own."""
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": home,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, str(options.rows), options.tokenizer, "--contestant", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "prepare_vs_trl.json")
    parser.add_argument("--contestant", choices=("ours", "trl"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps((time_ours if options.contestant == "ours" else time_trl)(options.rows, options.tokenizer)))
        return
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for turn in range(options.repeat):
        for name, found in runs.items():
            found.append(run_contestant(name, options))
            print(f"turn {turn + 1}: {name} {found[-1]['seconds']:.2f} s", flush=True)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], runs["trl"], strict=True)]
    result = {
        "rows": options.rows.name,
        "tokenizer": Path(options.tokenizer).name,
        "median_ratio": statistics.median(ratios),
        "ratios": ratios,
        "runs": runs,
        "workers": WORKERS,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"ours / TRL: median {result['median_ratio']:.3f} of {options.repeat} paired ratios; {options.output}")


if __name__ == "__main__":
    main()
