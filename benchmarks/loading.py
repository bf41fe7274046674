"""Memory and time of loading a base on CPU ranks: transformers' own loading against this project's.

    OMP_NUM_THREADS=1 python benchmarks/loading.py
    OMP_NUM_THREADS=1 python benchmarks/loading.py --layers 16 --only nf4 stored --loaders ours \\
        --output benchmarks/results/loading_stored.json

``stored`` is a base that ``dora-dist quantize`` has written in NF4, and is read as it is.

Makes a random Llama in bfloat16, in many files. Every rank is a process of its own that loads the model once, all ranks
of a run at the same time; files are in the page cache. Before, a tiny model is loaded, so that what is imported on
first use is not counted. Memory is what comes on top of that, per rank: ``resident`` with the pages of mapped files
(which ranks share), ``own`` without, ``kept`` once the model is there; in MB (10^6 bytes). ``processor`` are seconds of
a processor, which say more than the others where the machine is in use.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "bitsandbytes", "accelerate")
STORED = "stored"
CASES = (
    ("nf4", "float32"),
    ("nf4", "bfloat16"),
    (STORED, "float32"),
    (STORED, "bfloat16"),
    ("int8", "float32"),
    ("none", "float32"),
    ("none", "bfloat16"),
)
LOADERS = ("transformers", "ours")
PARTS = ("read", "read, pieces")
"""Parts of what ``ours`` adds to ``transformers``: files are read instead of mapped, and weights are quantized in
pieces. The rest is that freed memory is returned at the end."""
MB = 10**6


def load(loader: str, folder: str, quantization: str, dtype: str) -> Any:
    """The model, by one of :data:`LOADERS`."""
    import torch
    from transformers import AutoModelForCausalLM

    from dora_dist.base_model import lean_loading, load
    from dora_dist.base_model.quantization import quantization_config

    compute = getattr(torch, dtype)
    if loader == "ours":
        as_read = "nf4" if quantization == STORED else quantization
        spec = load.BaseModelSpec(path=folder, quantization=as_read, compute_dtype=compute)
        return load.load_base_model(spec)
    cpu = torch.device("cpu")
    read = lean_loading._files_read(cpu, mapped=False) if "read" in loader else contextlib.nullcontext()
    pieces = lean_loading.QuantizedInPieces() if "pieces" in loader else contextlib.nullcontext()
    # Even None would replace the setting in the base's own configuration.
    settings = {} if quantization == STORED else {"quantization_config": quantization_config(quantization, compute)}
    with read, pieces:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            **settings,
            dtype=compute,
            device_map={"": "cpu"},
        )


def write_stored(folder: Path) -> Path:
    """The model in 4 bits, beside the one in ``folder``."""
    import torch

    from dora_dist.base_model.load import BaseModelSpec
    from dora_dist.quantize.writing import write_quantized

    stored = folder.with_name(f"{folder.name}-stored")
    stored.mkdir()
    write_quantized(BaseModelSpec(path=str(folder)), stored, torch.device("cpu"))
    return stored


def run_rank(loader: str, quantization: str, dtype: str, tiny: str, folder: str) -> None:
    """Load the tiny model, say so, wait for a line, load the other one, and print memory and time of that as JSON."""
    from many_shards import size_of_model
    from process_memory import MemoryWatch

    load(loader, tiny, quantization, dtype)
    print("ready", flush=True)
    sys.stdin.readline()
    with MemoryWatch() as watch:
        model = load(loader, folder, quantization, dtype)
    figures = {"resident": watch.resident, "own": watch.anonymous, "kept": watch.kept}
    times = {"seconds": watch.seconds, "processor seconds": watch.processor_seconds}
    print(json.dumps({**figures, **times, "model": size_of_model(model)}), flush=True)


def run_ranks(ranks: int, *arguments: str) -> list[dict[str, float]]:
    """Start all ranks of one run; returns their figures."""
    command = [sys.executable, __file__, "--rank", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for _ in range(ranks)
        ]
        for process in processes:
            while process.stdout.readline().strip() != "ready":
                if process.poll() is not None:
                    sys.exit(f"a rank has failed; run it by hand: {' '.join(command)}")
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--shard-mb", type=int, default=60, help="size of one file of weights")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    parser.add_argument("--only", nargs="+", choices=[STORED, "nf4", "int8", "none"], help="these quantizations")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=LOADERS, help="whose loading")
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(*options.rank)
        return
    from many_shards import save_many_shards, size_of_shards

    from dora_dist.console.provenance import environment

    runs, where = [], environment(PACKAGES)
    with tempfile.TemporaryDirectory() as temporary:
        tiny = save_many_shards(Path(temporary) / "tiny", 64, 1, 10 * MB)
        folder = save_many_shards(Path(temporary) / "model", options.hidden, options.layers, options.shard_mb * MB)
        shards = size_of_shards(folder)
        whole, largest = sum(shards) / MB, max(shards) / MB
        started = time.monotonic()
        stored = [str(write_stored(path)) for path in (tiny, folder)]
        quantizing = time.monotonic() - started
        print(f"{whole:.0f} MB in {len(shards)} files, the largest of {largest:.0f} MB; per rank, in MB:")
        titles = ("model", "+ file", "resident", "own", "kept")
        print(f"{'':<38}{''.join(f'{title:>10}' for title in titles)}{'seconds':>9}{'processor':>11}")
        for quantization, dtype in CASES:
            if quantization not in (options.only or quantization):
                continue
            parts = PARTS if (quantization, dtype) == CASES[0] and not options.only else ()
            for ranks, loader in [*product((1,), parts), *product((1, 2), options.loaders)]:
                folders = stored if quantization == STORED else [str(tiny), str(folder)]
                found = run_ranks(ranks, loader, quantization, dtype, *folders)
                runs.append({"loader": loader, "quantization": quantization, "dtype": dtype, "ranks": found})
                most = {name: max(rank[name] for rank in found) for name in found[0]}
                title = f"{quantization:<6} {dtype:<9} {ranks} rank{'s' if ranks > 1 else ' '} {loader}"
                cells = [most["model"] / MB, most["model"] / MB + largest]
                cells += [most[name] / MB for name in ("resident", "own", "kept")]
                times = f"{most['seconds']:>9.1f}{most['processor seconds']:>11.1f}"
                print(f"{title:<38}{''.join(f'{cell:>10.0f}' for cell in cells)}{times}", flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/loading.py", *sys.argv[1:]]),
        "shards": shards,
        "seconds of dora-dist quantize": quantizing,
        "runs": runs,
        "libc": " ".join(platform.libc_ver()),
        "environment": where,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
