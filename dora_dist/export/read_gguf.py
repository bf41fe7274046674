"""What a GGUF file holds, as JSON on standard output: a program of its own, since it needs llama.cpp's ``gguf-py``."""

import json
import sys
from pathlib import Path
from typing import Any

FIELDS = ("general.architecture", "general.type", "adapter.", "tokenizer.")


def contents(file: Path) -> dict[str, Any]:
    """Fields of a GGUF file by their names, and of an adapter the size of every module's update.

    Returns:
        ``fields``: name -> value, of tokenizer, adapter and kind; ``updates``: Frobenius norms of
        ``lora_alpha / rank * B A`` in ascending order, by the scale that llama.cpp takes.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(FIELDS)}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    updates = [
        update_norm(lora_a, tensors[name.removesuffix("a") + "b"], fields["adapter.lora.alpha"])
        for name, lora_a in tensors.items()
        if name.endswith(".lora_a")
    ]
    return {"fields": fields, "updates": sorted(updates)}


def update_norm(lora_a: Any, lora_b: Any, alpha: float) -> float:
    """Frobenius norm of ``alpha / rank * B A``, for arrays ``A (rank, in)`` and ``B (out, rank)``."""
    lora_a, lora_b = lora_a.astype("float64"), lora_b.astype("float64")
    squared = ((lora_b.T @ lora_b) * (lora_a @ lora_a.T)).sum()
    return float(alpha / lora_a.shape[0] * squared**0.5)


if __name__ == "__main__":
    json.dump(contents(Path(sys.argv[1])), sys.stdout)
