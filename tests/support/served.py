"""llama.cpp for tests: its converters, and the program itself, built from the source package of its Python binding."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from support.repository import REPOSITORY

WANTED = ("conversion/", "convert_", "gguf-py/")
FLOAT32 = 0
"""GGML's number of the type float32, for keys and values, which are otherwise kept in 16 bits."""


def llama_cpp_folder() -> Path:
    """The folder of llama.cpp with the converters that belong to the installed binding; fetched once, by pip."""
    pytest.importorskip("llama_cpp", reason='llama-cpp-python is not installed: pip install "dora-dist[served]"')
    source = f"llama_cpp_python-{version('llama_cpp_python')}"
    folder = REPOSITORY / ".cache" / source / "vendor" / "llama.cpp"
    if not folder.is_dir():
        asked = ["--quiet", "--no-deps", "--no-binary", "llama-cpp-python", source.replace("-", "==").replace("_", "-")]
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run([sys.executable, "-m", "pip", "download", *asked, "-d", scratch], check=True)
            (archive,) = Path(scratch).iterdir()
            with tarfile.open(archive) as files:
                begin = f"{source}/vendor/llama.cpp/"
                wanted = [member for member in files if member.name.removeprefix(begin).startswith(WANTED)]
                files.extractall(REPOSITORY / ".cache", members=wanted, filter="data")
    return folder


class LlamaCppModel:
    """A GGUF file in llama.cpp, computed in float32 except for its weights.

    Args:
        model: the model's GGUF file.
        adapter: GGUF file of an adapter for the model.
        vocab_only: whether the file has no weights.
    """

    def __init__(self, model: Path, adapter: Path | None = None, vocab_only: bool = False) -> None:
        from llama_cpp import Llama

        self.llama = Llama(
            str(model),
            lora_path=None if adapter is None else str(adapter),
            vocab_only=vocab_only,
            n_ctx=256,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=FLOAT32,
            type_v=FLOAT32,
            verbose=False,
        )

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of every row of ``tokens``, shapes ``(rows, length)`` and ``(rows, length, vocabulary)``."""
        rows = []
        for row in tokens.tolist():
            self.llama.reset()
            self.llama.eval(row)
            rows.append(torch.tensor(self.llama.scores[: len(row)]))
        return torch.stack(rows)

    def tokens(self, text: str, add_bos: bool) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=add_bos, special=True)

    def stops_at(self, token: int) -> bool:
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self.llama.model), token)

    def answer(self, prompt: str, most: int) -> tuple[str, str]:
        """The greedy answer of at most so many tokens, and why it ended: ``stop`` or ``length``."""
        choice = self.llama.create_completion(prompt, max_tokens=most, temperature=0.0)["choices"][0]
        return choice["text"], choice["finish_reason"]


@torch.no_grad()
def torch_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits.float()


def greedy(logits_of, tokens: Tensor, most: int) -> Tensor:
    """The rows of ``tokens``, each continued by the ``most`` tokens with the largest logit."""
    for _ in range(most):
        following = logits_of(tokens)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens
