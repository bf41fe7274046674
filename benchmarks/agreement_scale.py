"""The agreement between ranks at scale: measured on 2, 4 and 8 local ranks, modelled for 8 to 1,024.

    python benchmarks/agreement_scale.py

Writes ``results/agreement_scale.json`` (constants, fit, check of the model against what it was not fitted on, tables)
and a picture. ``docs/scale.md`` says what is measured, what is assumed, and what follows.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scale_measure
import torch
from scale_model import (
    LLAMA_8B,
    LLAMA_405B,
    SHAPES,
    SIZE_BYTES,
    Network,
    Rank,
    base_seconds,
    checkpoint_files,
    checkpoint_seconds,
    event_bytes,
    event_seconds,
    resume_seconds,
    step_seconds,
    verify_seconds,
)
from scale_picture import draw

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "peft")
R0 = scale_measure.INITIAL_RANK
INTERVAL = 100
RANKS = (8, 64, 256, 1024)
FITTED, PREDICTED = (2, 4), (8,)
DTYPES = {"bfloat16": 2, "float32": 4}
NETWORKS = (
    Network("good: 25 GB/s, 10 us, reductions over trees", 10e-6, 25e9, tree=True, launch=30e-6),
    Network("bad: 1.25 GB/s, 50 us, rings only", 50e-6, 1.25e9, launch=30e-6),
)
GPU_ASSUMED = {"copy_rate": 4e9, "sync": 20e-6, "object_per_rank": 50e-6, "apply_per_layer": 100e-6, "kernel": 8e-6}
"""Not measured, for want of a GPU: the rate of copies to ordinary host memory, and the seconds of one wait for the
device, of two waits and an unpickling for every gathered object, of the kernels that zero a gate, and of one kernel."""
STEP_SECONDS = {"8B": 3.9, "70B": 17.0, "405B": 100.0}
"""Seconds of a step: 6 x parameters x tokens of one rank (16384; 8192; 8192, as in configs/) at 200 TFLOP/s, an
assumption."""
FILE_SYSTEMS = {"2 GB/s": 2e9, "50 GB/s": 50e9}
CLIENT_RATE = 2e9
"""Bytes per second of one reader, assumed."""
RANKS_PER_NODE = 8


def fit(found: Mapping[int, Mapping[str, Any]], rank: Rank) -> Network:
    """Launch, latency and bandwidth of the local gloo, fitted to the least times on ``FITTED`` ranks, by least squares
    of relative errors. These data do not tell launches from messages, so that launches are left at 0."""
    rows, wanted = [], []
    for n in FITTED:
        for name, timing in found[n].items():
            (latency, per_byte), local = _counts(name, n, rank)
            rows.append(np.array([latency, per_byte]) / timing["least"])
            wanted.append((timing["least"] - local) / timing["least"])
    # Seconds per byte are far smaller than seconds per message: without scaling, they would be rounded away.
    scale = np.array([1e-6, 1e-9])
    latency, per_byte = map(float, np.linalg.lstsq(np.array(rows) * scale, np.array(wanted), rcond=None)[0] * scale)
    if min(latency, per_byte) <= 0:
        raise RuntimeError(f"the fit has no sense: {latency} s a message, {per_byte} s a byte")
    return Network("gloo on this machine", latency, 1 / per_byte, shared=True)


def _counts(name: str, n: int, rank: Rank) -> tuple[list[float], float]:
    """Messages and bytes of all ranks in an exchange, and the seconds of what is local in it."""
    # Networks that have only one of the two constants, with the value 1.
    units = Network("", 1.0, float("inf"), shared=True), Network("", 0.0, 1.0, shared=True)
    if name.startswith("gather"):
        nbytes = int(name.split()[1])
        local = rank.object_fixed + n * rank.object_per_rank
        return [unit.gather(n, SIZE_BYTES) + unit.gather(n, nbytes) for unit in units], local
    nbytes = 4 if name == "any" else int(name.split()[1])
    return [unit.reduce(n, nbytes) for unit in units], 0.0


def predict(name: str, n: int, network: Network, rank: Rank) -> float:
    """Seconds of an exchange on this machine."""
    (messages, moved), local = _counts(name, n, rank)
    return messages * network.latency + moved / network.bandwidth + local


def check(found: Mapping[int, Mapping[str, Any]], network: Network, rank: Rank) -> list[dict[str, Any]]:
    """Predictions beside measurements, those of ``PREDICTED`` ranks being new to the model."""
    return [
        {
            "ranks": n,
            "exchange": name,
            "fitted": n in FITTED,
            "measured": timing["least"],
            "measured_median": timing["median"],
            "predicted": predict(name, n, network, rank),
            "predicted_to_measured": predict(name, n, network, rank) / timing["least"],
        }
        for n in (*FITTED, *PREDICTED)
        for name, timing in found[n].items()
    ]


def check_events(
    found: Mapping[int, Any], alone: Mapping[str, Any], network: Network, rank: Rank, cores: int
) -> list[dict[str, Any]]:
    """Like :func:`check`, for whole events and digests of the 8B adapter in float32, to which nothing was fitted."""
    rows = []
    for n, measured in found.items():
        crowding = max(1.0, n / cores)
        for name, model in (("event", event_seconds), ("verify", verify_seconds)):
            parts = model(LLAMA_8B, R0, 4, n, network, rank)
            local = sum(parts.get(part, 0.0) for part in ("hash", "copy to host", "selection"))
            local += alone["scoring"]["least"] if name == "event" else 0.0
            wire = sum(value for part, value in parts.items() if "gather" in part or "mean" in part)
            predicted = local * crowding + wire
            rows.append(
                {
                    "ranks": n,
                    "what": name,
                    "measured": measured[name]["least"],
                    "predicted": predicted,
                    "predicted_to_measured": predicted / measured[name]["least"],
                }
            )
    return rows


def local_rank(hashed: Mapping[str, Any], unpacking: Mapping[str, Any], alone: Mapping[str, Any]) -> Rank:
    """Constants of a rank on this machine."""
    sizes = sorted(unpacking["digest"])
    seconds = [unpacking["digest"][size]["least"] for size in sizes]
    per_rank = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    largest = alone["405B bfloat16"]
    return Rank(
        hash_rate=hashed["64 MiB"]["bytes"] / hashed["64 MiB"]["least"],
        copy_rate=float("inf"),
        sync=0.0,
        object_fixed=max(0.0, seconds[0] - sizes[0] * per_rank),
        object_per_rank=per_rank,
        select_per_component=largest["select_components"]["least"] / (R0 * LLAMA_405B.layers),
        apply_per_layer=largest["apply"]["least"] / LLAMA_405B.layers,
    )


def table(rank: Rank, operations: int) -> list[dict[str, Any]]:
    """Events, digests and steps of all shapes, dtypes, networks and numbers of ranks."""
    rows = []
    for shape in SHAPES:
        for dtype, width in DTYPES.items():
            for network in NETWORKS:
                for n in RANKS:
                    event = event_seconds(shape, R0, width, n, network, rank)
                    step, total = STEP_SECONDS[shape.name], sum(event.values())
                    rows.append(
                        {
                            "shape": shape.name,
                            "adapter": dtype,
                            "network": network.name,
                            "ranks": n,
                            "event_bytes_received": event_bytes(shape, R0, n),
                            "event_seconds": total,
                            "event_parts": event,
                            "event_share_at_interval": total / (INTERVAL * step),
                            "checkpoint_parts": checkpoint_seconds(shape, R0, width, n, network, rank),
                            "any_seconds": step_seconds(n, network),
                            "any_share_of_step": step_seconds(n, network) / step,
                            "scoring_share_of_step": operations * shape.layers * GPU_ASSUMED["kernel"] / step,
                        }
                    )
    return rows


def start_up(hash_rate: float) -> list[dict[str, Any]]:
    """Seconds in which all ranks read base and checkpoint, in several ways."""
    rows = []
    for shape in SHAPES:
        files = checkpoint_files(shape, R0, 4)
        # 4 bits and a constant of 8 bits for every 64 weights; the head and the embedding stay in 16 bits.
        quantized = checkpoint_files(shape, R0, 4, weight_bytes=0.5 + 1 / 64)
        for label, rate in FILE_SYSTEMS.items():
            for n in RANKS:
                nodes = -(-n // RANKS_PER_NODE)
                rows.append(
                    {
                        "shape": shape.name,
                        "file_system": label,
                        "ranks": n,
                        "base_bytes": files.base,
                        "base_read_by_every_rank": base_seconds(files, n, rate, CLIENT_RATE),
                        "base_read_by_every_node": base_seconds(files, nodes, rate, CLIENT_RATE),
                        "base_in_4_bits_read_by_every_node": base_seconds(quantized, nodes, rate, CLIENT_RATE),
                        "base_read_once": base_seconds(files, 1, rate, CLIENT_RATE),
                        "checkpoint_bytes_read": n * files.adapter + files.optimizer,
                        "checkpoint": resume_seconds(files, n, rate, CLIENT_RATE, hash_rate),
                    }
                )
    return rows


def measure(times: int) -> dict[str, Any]:
    """One pass over all measurements."""
    found: dict[str, Any] = {"hash": scale_measure.measure_hash()}
    found["unpacking"] = scale_measure.measure_unpacking((8, 64, 256, 1024), times)
    found["scoring_operations"] = scale_measure.scoring_operations()
    found["alone"] = {
        f"{shape.name} {dtype}": scale_measure.measure_alone(shape, getattr(torch, dtype), 3)
        for shape in SHAPES
        for dtype in DTYPES
    }
    for what, shape, count in (("exchanges", None, times), ("events of 8B", LLAMA_8B, 5)):
        found[what] = {n: scale_measure.on_ranks(n, shape, count) for n in (*FITTED, *PREDICTED)}
    return found


def read_measurements(path: Path) -> dict[str, Any]:
    """The measurements of an earlier result; JSON has made text of the numbers of ranks."""

    def restore(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {int(key) if key.isdecimal() else key: restore(each) for key, each in value.items()}

    return restore(json.loads(path.read_text(encoding="utf-8"))["measurements"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=50, help="of every exchange; default: %(default)s")
    parser.add_argument("--passes", type=int, default=3, help="over all measurements; default: %(default)s")
    parser.add_argument(
        "--merge", type=Path, nargs="*", default=[], help="earlier results, whose measurements count as further passes"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    passes = [read_measurements(path) for path in options.merge]
    for number in range(options.passes):
        passes.append(measure(options.repeat))
        print(f"pass {number + 1} of {options.passes}: load {os.getloadavg()[0]:.1f}", flush=True)
    measured = scale_measure.merge(passes)
    rank = local_rank(measured["hash"], measured["unpacking"], measured["alone"])
    network = fit(measured["exchanges"], rank)
    gpu = Rank(**{**vars(rank), **{name: GPU_ASSUMED[name] for name in vars(rank) if name in GPU_ASSUMED}})
    result = {
        "command": f"python benchmarks/agreement_scale.py --repeat {options.repeat} --passes {options.passes}"
        + (f" --merge ({len(options.merge)} earlier results)" if options.merge else ""),
        "cores": cores,
        "load_before": round(load, 2),
        "processor_has_sha_instructions": "sha_ni" in Path("/proc/cpuinfo").read_text(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "commits_of_merged_passes": [json.loads(path.read_text())["commit"] for path in options.merge],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "measured_constants": {"rank": vars(rank) | {"copy_rate": None}, "gloo": vars(network)},
        "assumed_constants": {
            "gpu": GPU_ASSUMED,
            "networks": [vars(each) for each in NETWORKS],
            "step_seconds": STEP_SECONDS,
            "file_systems": FILE_SYSTEMS,
            "client_rate": CLIENT_RATE,
            "ranks_per_node": RANKS_PER_NODE,
        },
        "check_of_exchanges": check(measured["exchanges"], network, rank),
        "check_of_events": check_events(
            measured["events of 8B"], measured["alone"]["8B float32"], network, rank, cores
        ),
        "table": table(gpu, measured["scoring_operations"]),
        "start_up": start_up(rank.hash_rate),
        "measurements": measured,
    }
    (RESULTS / "agreement_scale.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, RESULTS / "agreement_scale.png")
    ratios = [row["predicted_to_measured"] for row in result["check_of_exchanges"] if not row["fitted"]]
    print(f"gloo: {network}; predicted / measured on {PREDICTED} ranks: {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
