"""A random 16-bit Llama in many files, nearly all of it weights that are quantized."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_many_shards(folder: Path, hidden: int, layers: int, shard_bytes: int) -> Path:
    """Write the model.

    Args:
        folder: the folder to write into.
        hidden: size of the model, a multiple of 64.
        layers: number of decoder layers, of 12.25 hidden^2 elements each.
        shard_bytes: largest size of one file, in bytes.
    """
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def size_of_shards(folder: Path) -> list[int]:
    """Bytes of every file of weights."""
    return [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]


def size_of_model(model: torch.nn.Module) -> int:
    """Bytes of all tensors of a model: weights, constants of quantized ones, and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = state.state2
            tensors += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
        if getattr(parameter, "SCB", None) is not None:
            tensors.append(parameter.SCB)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
