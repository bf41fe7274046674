"""The frozen base that all contestants share: a Llama with random weights, quantized to NF4 while it is created."""

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dora_dist.base_model.quantization import forbid_inference_packing, quantization_config, quantized_weight
from dora_dist.benchmark.shapes import Shape

STANDARD_DEVIATION = 0.02


def llama_config(shape: Shape) -> LlamaConfig:
    """The configuration of a model of this shape."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(shape.sequence, 2048),
        use_cache=False,
    )


def build_base(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """A quantized, frozen model. Weights are created and quantized layer by layer on the device: the model never exists
    in 16 bits, and no file is read.

    Args:
        shape: shape of the model.
        device: device of the model.
        dtype: dtype of the computation and of the unquantized parts (embedding, head, norms).
        seed: seed of the weights.
    """
    config = llama_config(shape)
    quantization = quantization_config("nf4", dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _random(module, parameter, device, dtype, generator))
    # Attributes that transformers sets on a quantized model; PEFT reads both. torch's types lack them.
    model.config.quantization_config = quantization
    model.is_loaded_in_4bit = model.is_quantized = True  # type: ignore[assignment]
    model.requires_grad_(False)
    forbid_inference_packing(model)
    return model


def _random(
    module: nn.Module, parameter: Tensor, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> nn.Parameter:
    """Norm weights are 1; all others are normally distributed, those of linear layers quantized."""
    value = torch.ones(parameter.shape, device=device, dtype=dtype)
    if value.ndim > 1:
        value.normal_(0, STANDARD_DEVIATION, generator=generator)
    if isinstance(module, Linear4bit):
        former = quantized_weight(module)
        weight = Params4bit(
            value,
            requires_grad=False,
            quant_type=former.quant_type,
            compress_statistics=former.compress_statistics,
            quant_storage=former.quant_storage,
            module=module,
        )
        # This quantizes. bitsandbytes' type says that it returns a tensor.
        return weight.to(device)  # type: ignore[misc]
    return nn.Parameter(value, requires_grad=False)


def random_rows(shape: Shape, device: torch.device, seed: int, rank: int, number: int) -> Tensor:
    """Tokens of a step by the step's number, shape ``(batch, sequence)``: the same for all contestants, different on
    each rank."""
    generator = torch.Generator().manual_seed((seed * 2**12 + rank) * 2**16 + number)
    return torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), generator=generator).to(device)
