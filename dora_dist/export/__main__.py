"""Write the adapter of a run in a form that other programs load, and prove that it holds what was trained.

peft     an adapter with one rank for all modules, padded with zeros, as in RUN/adapter: for PEFT, vLLM and SGLang
compact  an adapter with every module's own rank, without padding: for PEFT; older versions of vLLM do not take it
merged   a plain 16-bit model without adapter: the base's weights, as the adapter was trained on them, plus its update
gguf     adapter.gguf and merged.gguf for llama.cpp, by its own converters
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.console.arguments import add_run_options
from dora_dist.console.command import run_command
from dora_dist.console.files import new_folder, refuse_taken
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.export.llama_cpp import PARTS, find_llama_cpp

if TYPE_CHECKING:
    from dora_dist.export.formats import Exported

FORMATS = ("peft", "compact", "merged", "gguf")
RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Ranks that vLLM takes as ``max_lora_rank`` and that are a power of two."""
DTYPES = ("bfloat16", "float16", "float32")
OWN_OPTIONS = {
    "base": ("merged", "gguf"),
    "dtype": ("merged", "gguf"),
    "llama_cpp": ("gguf",),
    "part": ("gguf",),
    "rank": ("peft",),
}
"""Options that only some formats have."""

EPILOG = """\
Nothing is kept that has not been read back and compared with the run: peft, compact and merged by the logits of base
and adapter, in float32; adapter.gguf by the size of every update; merged.gguf by the logits of the merged model before
it is converted, and by its tokens. Logits need memory for the base, and for the merged model also for the whole model
in float32 on the CPU. The base goes to the first GPU if there is one; with CUDA_VISIBLE_DEVICES= (empty) in front,
everything stays on the CPU."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist export",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    parser.add_argument("--format", choices=FORMATS, required=True, help="see above")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write; RUN/export-FORMAT by default")
    parser.add_argument(
        "--base",
        choices=("quantized", "original"),
        help="merged, gguf: the dequantized base that the adapter was trained on (default), or the one that was never "
        "quantized, to which the adapter has not been fitted",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="merged, gguf: of the weights written; bfloat16 by default")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="gguf: folder of llama.cpp, with its converters; LLAMA_CPP of the environment by default",
    )
    parser.add_argument("--part", choices=PARTS, help="gguf: write only this one; both by default")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help=f"peft: one of {', '.join(map(str, RANKS))}; by default the smallest that holds every module",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Export one run as one format.

    Raises:
        ValueError: the configuration or the input is invalid.
        ExpectedRunError: the files written do not compute what was trained; they have been removed again.
    """
    quiet_libraries()
    options = build_parser().parse_args(arguments)
    check_options(options)
    output = options.output or options.run / f"export-{options.format}"
    refuse_taken(output, "--output")
    llama_cpp = find_llama_cpp(options.llama_cpp) if options.format == "gguf" else None
    # Heavy imports wait until the arguments have been found to be sound.
    from dora_dist.export import formats, to_gguf
    from dora_dist.routing.files import is_routed
    from dora_dist.runs.trained_run import open_asked

    trained = open_asked(options)
    if is_routed(trained.adapter):
        raise ValueError(
            f"{options.run} was trained with adapter.routing prompt: which modules are adapted depends on the prompt, "
            "so that no plain LoRA and no merged model computes the same. Its adapter is for dora-dist generate and "
            "dora_dist.load_adapter"
        )
    dtype, original = options.dtype or DTYPES[0], options.base == "original"
    with Phases(f"exporting {options.run}"), new_folder(output) as folder:
        if options.format == "peft":
            exported = formats.export_peft(trained, folder, options.rank)
        elif options.format == "compact":
            exported = formats.export_compact(trained, folder)
        elif options.format == "merged":
            exported = formats.export_merged(trained, folder, dtype, original)
        else:
            assert llama_cpp is not None
            parts = PARTS if options.part is None else (options.part,)
            exported = to_gguf.export_gguf(trained, folder, llama_cpp, parts, dtype, original)
    print(describe(output, exported))


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: some do not.
    """
    for name, owners in OWN_OPTIONS.items():
        if getattr(options, name) is not None and options.format not in owners:
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of --format {' and '.join(owners)}, but --format is "
                f"{options.format}: leave it out"
            )
    for name in ("base", "dtype"):
        if options.part == "adapter" and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for the merged model, but --part is adapter: leave one of them out")
    if options.rank is not None and options.rank not in RANKS:
        raise ValueError(f"--rank is {options.rank}, but must be one of {', '.join(map(str, RANKS))}")


def describe(output: Path, exported: "Exported") -> str:
    """The text to print at the end. ``{folder}`` in the usage becomes the folder written."""
    lines = [f"Wrote {output}", f"  {exported.content}", "", f"Verified {exported.how_checked}"]
    lines += [f"  {line}" for line in exported.verification]
    lines += ["", "How to load it"]
    lines += [f"  {line}" for line in exported.usage.replace("{folder}", str(output)).splitlines()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
