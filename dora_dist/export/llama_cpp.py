"""llama.cpp's own converters, from a folder of llama.cpp that the user has; nothing of it needs to be built."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "LLAMA_CPP"
MODEL_CONVERTER, ADAPTER_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
LIBRARY = "gguf-py"
NEEDED = (MODEL_CONVERTER, ADAPTER_CONVERTER, f"{LIBRARY}/gguf")
PARTS = ADAPTER, MERGED = ("adapter", "merged")
"""The things that can be converted, which are also the names of the files."""
HOW_TO_GET = (
    "`git clone --depth 1 https://github.com/ggml-org/llama.cpp` brings it, and nothing needs to be built; the source "
    "package of llama-cpp-python has it too, in vendor/llama.cpp"
)


@dataclass(frozen=True)
class LlamaCpp:
    """A folder of llama.cpp with its converters. They run in processes of their own, with this Python."""

    folder: Path

    def convert_model(self, source: Path, target: Path, outtype: str, *options: str) -> None:
        """Convert a folder in Hugging Face's layout to the file ``target``.

        Args:
            source: folder of config and tokenizer, and of weights unless ``--vocab-only`` is among the options.
            target: the GGUF file.
            outtype: type of the matrices: f32, f16 or bf16.
            options: further options of the converter.

        Raises:
            ValueError: the converter refuses it.
        """
        asked = [str(source), "--outfile", str(target), "--outtype", outtype, *options]
        self._run([str(self.folder / MODEL_CONVERTER), *asked], f"{MODEL_CONVERTER} refuses model and tokenizer")

    def convert_adapter(self, source: Path, base: Path, target: Path) -> None:
        """Convert a folder with plain LoRA to the file ``target``, in float32.

        Args:
            source: folder of the adapter.
            base: folder with the base's config; its weights are not needed.
            target: the GGUF file.

        Raises:
            ValueError: the converter refuses it.
        """
        asked = [str(source), "--base", str(base), "--outfile", str(target), "--outtype", "f32"]
        self._run([str(self.folder / ADAPTER_CONVERTER), *asked], f"{ADAPTER_CONVERTER} refuses the adapter")

    def set_tokens(self, file: Path, tokens: dict[str, int]) -> None:
        """Name further special tokens in a GGUF file (``eot`` or ``eom`` -> id), which is written anew."""
        if not tokens:
            return
        changed = file.with_suffix(".changed")
        asked = [part for name, token in tokens.items() for part in ("--special-token-by-id", name, str(token))]
        self._run(["-m", "gguf.scripts.gguf_new_metadata", str(file), str(changed), *asked], f"{LIBRARY} fails")
        changed.replace(file)

    def read(self, file: Path) -> dict[str, Any]:
        """The contents of a GGUF file, as :mod:`dora_dist.export.read_gguf` reads them."""
        found: dict[str, Any] = json.loads(
            self._run(["-m", "dora_dist.export.read_gguf", str(file)], f"{LIBRARY} cannot read {file.name}")
        )
        return found

    def _run(self, command: list[str], flaw: str) -> str:
        path = os.pathsep.join([str(self.folder / LIBRARY), *filter(None, [os.environ.get("PYTHONPATH")])])
        finished = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        if finished.returncode:
            said = finished.stderr.strip().splitlines()
            raise ValueError(
                f"llama.cpp's {flaw}: {said[-1] if said else f'exit status {finished.returncode}'} (in {self.folder}). "
                "Another version of llama.cpp may take it; --format peft and merged do not need it"
            )
        return finished.stdout


def find_llama_cpp(folder: Path | None) -> LlamaCpp:
    """llama.cpp in a folder, or in the one that the environment names in ``LLAMA_CPP``.

    Raises:
        ValueError: there is none, or something that is needed is missing in it.
    """
    named = os.environ.get(VARIABLE)
    if folder is None and not named:
        raise ValueError(
            f"--format gguf needs llama.cpp's own converters: give its folder with --llama-cpp FOLDER, or in the "
            f"environment as {VARIABLE}. {HOW_TO_GET}"
        )
    found = (Path(named or "") if folder is None else folder).expanduser().resolve()
    missing = [name for name in NEEDED if not (found / name).exists()]
    if missing:
        origin = f"{VARIABLE} of the environment" if folder is None else "--llama-cpp"
        raise ValueError(
            f"{origin} is {found}, but there is no {missing[0]}: give the folder of llama.cpp. {HOW_TO_GET}"
        )
    return LlamaCpp(found)
