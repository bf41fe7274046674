"""What this project needs to know about bitsandbytes: how a base is quantized, and how to read it back."""

from collections.abc import Sequence
from typing import cast

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from dora_dist.config.model import QUANTIZATIONS


def quantization_config(
    quantization: str, compute_dtype: torch.dtype, leave_out: Sequence[str] = ()
) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of a base: NF4 with double quantization (QLoRA's), LLM.int8, or none.

    Args:
        quantization: one of :data:`~dora_dist.config.model.QUANTIZATIONS`.
        compute_dtype: of 4-bit layers.
        leave_out: modules that stay as they are; where none is named, transformers leaves out the output head.

    Raises:
        ValueError: ``quantization`` is none of these.
    """
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=list(leave_out) or None,
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(leave_out) or None)
    if quantization == "none":
        return None
    raise ValueError(f"quantization is {quantization!r}, but must be one of {', '.join(QUANTIZATIONS)}")


def forbid_inference_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    There, the first forward without gradients (an evaluation, say) repacks the weight in place for a kernel that has
    no backward: training that goes on afterwards silently gets no gradient through the layer. Seen in bitsandbytes
    0.50.2, ``Linear4bit.forward`` and ``matmul_4bit``; this can go when a packed weight is unpacked for training there.

    Raises:
        ValueError: a weight has been packed already.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"the 4-bit weight of {name} has been repacked for CPU inference, where gradients do not pass: "
                    "load the model again and add the adapter before the first forward"
                )
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def dequantized_weight(module: nn.Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight ``(out, in)`` that a linear layer computes with, in ``dtype``: dequantized where it is quantized."""
    if isinstance(module, Linear4bit):
        return bnb_functional.dequantize_4bit(module.weight.data, quantization_state(module)).to(dtype)
    if isinstance(module, Linear8bitLt):
        state = module.state
        # Before the first forward the codes and scales are with the parameter, afterwards with the layer's state.
        parameter = cast(Int8Params, module.weight)
        codes = parameter.CB if state.CB is None else state.CB
        scales = parameter.SCB if state.SCB is None else state.SCB
        codes = parameter.data if codes is None else codes
        dequantized: Tensor = bnb_functional.int8_vectorwise_dequant(codes, scales)
        return dequantized.to(dtype)
    return module.weight.to(dtype)


def quantized_weight(module: Linear4bit) -> Params4bit:
    """The weight of a 4-bit layer, of whose types bitsandbytes says only that it is a tensor."""
    return cast(Params4bit, module.weight)


def quantization_state(module: Linear4bit) -> bnb_functional.QuantState:
    """What a 4-bit layer's codes mean: the weight's, or the layer's own, for codes that ranks gather from their shards
    are a plain tensor without it."""
    state = getattr(module.weight, "quant_state", None)
    return cast(bnb_functional.QuantState, module.quant_state if state is None else state)


SAMPLE = 256
"""Elements of a weight that ranks compare."""


def keep_for_shards(layer: nn.Module) -> None:
    """Let modules keep what can be read of a whole weight only: its constants, and the sample of it that ranks compare.

    Args:
        layer: whose weights are whole.
    """
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            if isinstance(module, Linear4bit):
                module.quant_state = quantization_state(module)
            module.weight_sample = sample_of(module).clone()


def sample_of(module: nn.Module) -> Tensor:
    """The first :data:`SAMPLE` elements of a module's weight, as it is stored, also where ranks hold shards of it."""
    kept = vars(module).get("weight_sample")
    if kept is not None:
        return cast(Tensor, kept)
    return cast(Tensor, module.weight).detach().flatten()[:SAMPLE]


def product_dtype(module: nn.Module, output: Tensor) -> torch.dtype:
    """The dtype in which a linear layer has multiplied to get this output, and multiplies in its backward; a gradient
    of the output tells as well."""
    if isinstance(module, Linear4bit) and module.compute_dtype is not None:
        dtype: torch.dtype = module.compute_dtype
        return dtype
    return output.dtype


def is_known_linear(module: nn.Module) -> bool:
    """Whether a layer computes as torch's linear layer or one of bitsandbytes' quantized ones. The input gradient of
    one that computes in a way of its own would not be ``grad @ weight``."""
    known = (nn.Linear.forward, Linear4bit.forward, Linear8bitLt.forward)
    return getattr(type(module), "forward", None) in known
