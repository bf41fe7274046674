"""The command: measures, prints a table, and writes JSON and a picture."""

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dora_dist.benchmark.options import Options, build_parser, check_device, resolve
from dora_dist.console.command import run_command
from dora_dist.console.files import write_json
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.text import aligned, say


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the requested measurement.

    Raises:
        ValueError: an option is invalid.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser().parse_args(arguments)
    options = resolve(parsed)
    # Libraries read both variables when they are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    quiet_libraries()
    check_device(options.device)

    environment = describe(options, arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if parsed.scoring:
        _scoring(options, environment)
        return
    import torch

    from dora_dist.distributed.world import join_at_file

    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
        agreement = join_at_file(Path(folder) / "meeting", rank=0, size=1, device=device)
        chosen = {_growth: parsed.growth, _operations: parsed.operations, _generating: parsed.generating}
        work = next((work for work, wanted in chosen.items() if wanted), _comparison)
        work(options, environment, agreement)
        agreement.close()


def describe(options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """Environment and settings of a measurement; must be called before it."""
    import torch

    from dora_dist.console.provenance import BENCHMARK_PACKAGES, environment

    return {
        "command": shlex.join(["python", "-m", "dora_dist.benchmark", *arguments]),
        **environment(BENCHMARK_PACKAGES),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "compute_dtype": options.compute_dtype,
        "adapter_dtype": options.adapter_dtype,
        "kernels": options.kernels,
        "rank": options.rank,
        "target_rank": options.target_rank,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "seed": options.seed,
        "quick": options.quick,
    }


def _comparison(options: Options, environment: dict[str, Any], agreement: Any) -> None:
    from dora_dist.benchmark.comparison import compare, comparison_rows, method_lines
    from dora_dist.benchmark.pictures import draw_comparison
    from dora_dist.benchmark.shapes import FLOPS_FORMULA

    records: list[dict[str, Any]] = []
    for shape in options.shapes:
        records += compare(shape, options, agreement)
    for record in records:
        profile = record.pop("profile", None)
        if profile is not None:
            checkpointing = "_checkpointing" if record["checkpointing"] else ""
            name = f"profile_{record['shape']}_{options.profile}{checkpointing}{_suffix(options)}.txt"
            (options.output / name).write_text(profile + "\n", encoding="utf-8")
            say(f"wrote {options.output / name}")
    result = {
        "environment": environment,
        "peak_tflops": options.peak_tflops,
        "model_flops_formula": FLOPS_FORMULA,
        "records": records,
    }
    print(aligned(comparison_rows(records), num_words=3))
    print("\n".join(method_lines(records)))
    path = _keep(result, "benchmark", options)
    draw_comparison(records, f"The same step of the same NF4 base, rank {options.rank}\n{_where(environment)}", path)
    say(f"wrote {path}")


def _growth(options: Options, environment: dict[str, Any], agreement: Any) -> None:
    from dora_dist.benchmark.growth.measure import growth_rows, measure_growth
    from dora_dist.benchmark.pictures import draw_growth

    result = {"environment": environment, **measure_growth(options, agreement)}
    print(aligned(growth_rows(result)))
    path = _keep(result, "growth", options)
    draw_growth(result, f"A step as the work grows\n{_where(environment)}", path)
    say(f"wrote {path}")


def _operations(options: Options, environment: dict[str, Any], agreement: Any) -> None:
    from dora_dist.benchmark.operations import count_operations, operation_rows

    records = [record for shape in options.shapes for record in count_operations(shape, options, agreement)]
    print(aligned(operation_rows(records), num_words=5))
    _keep({"environment": environment, "records": records}, "operations", options)


def _generating(options: Options, environment: dict[str, Any], agreement: Any) -> None:
    from dora_dist.benchmark.generation import generation_rows, measure_generation

    records = [measure_generation(shape, options, agreement) for shape in options.shapes]
    print(aligned(generation_rows(records), num_words=3))
    _keep({"environment": environment, "records": records}, "generation", options)


def _scoring(options: Options, environment: dict[str, Any]) -> None:
    from dora_dist.benchmark.scoring import measure_scoring, scoring_rows

    result = {"environment": environment, **measure_scoring(options)}
    print(aligned(scoring_rows(result)))
    _keep(result, "scoring", options)


def _keep(result: dict[str, Any], name: str, options: Options) -> Path:
    """Write the JSON; returns the path for a picture beside it."""
    path = options.output / f"{name}{_suffix(options)}.json"
    write_json(path, result)
    say(f"wrote {path}")
    return path.with_suffix(".png")


def _suffix(options: Options) -> str:
    """Suffix that distinguishes results of a GPU from those of a CPU."""
    return "_cuda" if options.device == "cuda" else ""


def _where(environment: dict[str, Any]) -> str:
    return environment["gpu"] or f"{environment['cpu']}, {environment['torch_threads']} threads"


if __name__ == "__main__":
    run_command(main)
