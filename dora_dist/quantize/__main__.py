"""Write a base in 4 bits once, so that runs need not read its 16 bits and quantize them every time.

The layout is bitsandbytes' own, NF4 with double quantization: model.path of a run, and transformers' from_pretrained,
take the folder as it is. A run on it gives the same numbers as one on BASE with model.quantization: nf4. The model is
never in memory as a whole: this takes the memory of its largest tensor and of one file, about 2 GB.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from dora_dist.console.command import run_command
from dora_dist.console.files import new_folder, refuse_taken
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.console.text import format_bytes, time_span

DTYPES = ("auto", "float32", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="folder in the Hugging Face layout, or name of a model on the Hub")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write, which does not exist yet")
    parser.add_argument(
        "--compute-dtype",
        choices=DTYPES,
        default="auto",
        help="in which weights are read before they are quantized: model.compute_dtype of the runs that are to give "
        "the same numbers (default: auto). It matters for a base in float32 only",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the base, on the GPU if there is one.

    Raises:
        ValueError: OUT exists, or BASE cannot be quantized.
    """
    quiet_libraries()
    options = build_parser().parse_args(arguments)
    refuse_taken(options.output, "OUT")
    # Heavy imports wait until the arguments have been found to be sound.
    from dora_dist.base_model.load import BaseModelSpec, resolve_compute_dtype
    from dora_dist.quantize.writing import write_quantized
    from dora_dist.runs.trained_run import default_device

    spec = BaseModelSpec(
        path=options.base,
        compute_dtype=resolve_compute_dtype(options.compute_dtype),
        trust_remote_code=options.trust_remote_code,
    )
    started = time.monotonic()
    with Phases(f"reading {options.base}") as phases, new_folder(options.output) as folder:

        def note(phase: str) -> None:
            phases.phase = phase

        written = write_quantized(spec, folder, default_device(), note)
    before, after = format_bytes(written.bytes_before), format_bytes(written.bytes_after)
    print(
        f"Wrote {options.output}: {written.layers} linear layers in NF4, {before} -> {after} in {written.files} "
        f"file{'s' if written.files > 1 else ''}, in {time_span(time.monotonic() - started)}\n"
        f"  a run reads it with model.path: {options.output} (and model.quantization: nf4, the default)"
    )


if __name__ == "__main__":
    run_command(main)
