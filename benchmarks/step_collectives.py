"""The collectives of an ordinary training step: how many, and of how many bytes, under every engine.

    python benchmarks/step_collectives.py

Starts real runs of a tiny model on 2 and 4 gloo ranks and records what torch's process groups are asked for in one step
that has no pruning event, no line of the log, no evaluation and no save: from the beginning of that step to the
beginning of the next one. Whoever asks is seen, DDP's C++ too, for torch's profiler sees every operation. Writes
``results/step_collectives.json``; docs/scale.md says what follows.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
ENGINES, RANKS = ("zero2", "ddp"), (2, 4)
STEP = 3
"""The step that is watched: no event is due at it in :data:`SETTINGS`."""
SETTINGS = {
    "training.max_steps": 12,
    "training.per_device_train_batch_size": 2,
    "training.logging_steps": 100,
    "training.save_steps": 100,
    "pruning.interval": 2,
    "evaluation.before": False,
    "evaluation.exact_match": False,
    "data.eval": "null",
}
SIZES = {"unsigned char": 1, "c10::BFloat16": 2, "int": 4, "float": 4, "long int": 8, "double": 8}
"""Bytes of an element, by torch's names of types in a profile."""

Collective = dict[str, Any]


def collectives(events: Sequence[Mapping[str, Any]]) -> list[Collective]:
    """The exchanges in the events of a profile in Chrome's form: kind, type, elements and bytes that this rank gave,
    and number of times; the largest first.

    Raises:
        ValueError: gloo did not carry out everything that was asked for, so that something would be missing here.
    """
    asked = [event["name"] for event in events if event["name"].startswith("c10d::")]
    done = [event for event in events if event["name"].startswith("gloo:")]
    if len(asked) != len(done):
        raise ValueError(f"{len(asked)} collectives were asked for ({asked}), and {len(done)} are in the profile")
    counted: Counter[tuple[str, str, int]] = Counter()
    for event in done:
        (kind,), (shape,) = event["args"]["Input type"], event["args"]["Input Dims"]
        elements = 1
        for size in shape:
            elements *= size
        counted[event["name"].removeprefix("gloo:"), kind, elements] += 1
    listed = [
        {"collective": name, "dtype": kind, "elements": elements, "bytes": elements * SIZES[kind], "times": times}
        for (name, kind, elements), times in counted.items()
    ]
    return sorted(listed, key=lambda each: (-each["bytes"], each["collective"], each["dtype"]))


def watch_step(output: Path) -> None:
    """Let the run of this process record the collectives of step :data:`STEP` into a file."""
    from dora_dist.training.trainer import DynamicLoraTrainer

    begin_step = DynamicLoraTrainer.begin_step
    watch = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def watched(trainer: DynamicLoraTrainer) -> None:
        if trainer.state.global_step + 1 == STEP:
            watch.start()
        elif trainer.state.global_step == STEP:
            watch.stop()
            with tempfile.TemporaryDirectory() as folder:
                watch.export_chrome_trace(f"{folder}/trace.json")
                events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
            trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
            found = {
                "adapter_elements": sum(parameter.numel() for parameter in trained),
                "adapter_bytes": sum(parameter.nbytes for parameter in trained),
                "collectives": collectives(events),
            }
            output.write_text(json.dumps(found))
        begin_step(trainer)

    DynamicLoraTrainer.begin_step = watched  # type: ignore[method-assign]


def run_rank(arguments: Sequence[str]) -> None:
    """Run one rank: ``arguments`` are the file for its findings, and the arguments of ``dora_dist.train``."""
    output, *rest = arguments
    watch_step(Path(f"{output}-{os.environ['RANK']}"))
    from dora_dist.train import main as train

    train(rest)


def measure(folder: Path, engine: str, ranks: int, data: Mapping[str, Path]) -> dict[str, Any]:
    """The collectives of a step of the quickstart's run, which are the same on all ranks.

    Raises:
        RuntimeError: the run did not end well, or the ranks have counted differently.
    """
    from dora_dist.distributed.start_ranks import start_ranks

    output = folder / f"{engine}-{ranks}"
    given = {**SETTINGS, "distributed.engine": engine}
    configuration = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    arguments = [str(output), "--config", str(configuration), "--output_dir", f"{output}-run"]
    arguments += [part for key, value in given.items() for part in (f"--{key}", str(value).lower())]
    arguments += [part for key, path in data.items() for part in (f"--{key}", str(path))]
    status = start_ranks(engine, ranks, 0, "step_collectives", arguments)
    if status:
        raise RuntimeError(f"the run under {engine} on {ranks} ranks ended with status {status}")
    found = [json.loads(Path(f"{output}-{rank}").read_text()) for rank in range(ranks)]
    if any(each != found[0] for each in found):
        raise RuntimeError(f"the ranks have counted differently: {found}")
    return {"engine": engine, "ranks": ranks, **found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "step_collectives.json")
    options = parser.parse_args()
    from dora_dist.console.provenance import BENCHMARK_PACKAGES, environment
    from dora_dist.quickstart.backbone import BackboneSettings
    from dora_dist.quickstart.folder import ensure_quickstart

    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Hardly pretrained: what the model says does not matter here.
        made = ensure_quickstart(folder / "quickstart", settings=BackboneSettings(steps=8))
        data = {"model.path": made / "backbone", "data.train": made / "train.jsonl"}
        cases = [measure(folder, engine, ranks, data) for engine in ENGINES for ranks in RANKS]
    command = "python benchmarks/step_collectives.py"
    result = {"command": command, "environment": environment(BENCHMARK_PACKAGES), "cases": cases}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for case in cases:
        print(f"{case['engine']}, {case['ranks']} ranks, {case['adapter_bytes']:,} bytes are trained")
        for each in case["collectives"]:
            print(f"  {each['times']} x {each['collective']:<14} {each['bytes']:>9,} bytes of {each['dtype']}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and "RANK" in os.environ:
        run_rank(sys.argv[1:])
    else:
        main()
