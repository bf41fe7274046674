"""Everything that this project knows about bitsandbytes: how a base is quantized, or is stored quantized, and how to
dequantize it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from dora_dist.config.model import QUANTIZATIONS
from dora_dist.console.files import read_json

STORED_TITLES = {"nf4": "bitsandbytes' NF4", "fp4": "bitsandbytes' FP4", "int8": "bitsandbytes' 8 bits"}
"""Kind of quantization in which bitsandbytes may have stored a base -> its name for messages."""
QUANTIZED_FROM = "quantized_from"
"""Entry of ``quantization_config`` in the ``config.json`` of a base that ``dora-dist quantize`` has written: the base
that it was made from. transformers ignores it."""


def quantization_config(
    quantization: str, compute_dtype: torch.dtype, leave_out: Sequence[str] = ()
) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of a base: NF4 with double quantization (QLoRA's), LLM.int8, or None.

    Args:
        quantization: one of :data:`~dora_dist.config.model.QUANTIZATIONS`.
        compute_dtype: dtype in which 4-bit layers compute.
        leave_out: names of modules that stay as they are; if empty, transformers leaves out the output head.

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


def stored_quantization(config: PreTrainedConfig, path: str) -> BitsAndBytesConfig | None:
    """The quantization of a base in its files: bitsandbytes' NF4, with or without double quantization; None if it is
    not quantized.

    Args:
        config: configuration of the base.
        path: path of the base, for the message.

    Raises:
        ValueError: it is quantized in any other way.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    settings = dict(given)
    bits = "int8" if settings.get("load_in_8bit") else settings.get("bnb_4bit_quant_type", "fp4")
    by_bitsandbytes = "load_in_4bit" in settings or settings.get("quant_method") == "bitsandbytes"
    storage = settings.get("bnb_4bit_quant_storage") or "uint8"
    kind = STORED_TITLES[bits] if by_bitsandbytes else str(settings.get("quant_method", "an unknown method"))
    if not by_bitsandbytes or bits != "nf4" or storage != "uint8":
        raise ValueError(
            f"the model at model.path {path!r} is stored quantized by {kind}"
            f"{f' in tensors of {storage}' if storage != 'uint8' else ''}, on which nothing is trained here: of "
            "quantized models, those in bitsandbytes' NF4 in tensors of uint8 are read as they are. Give the model in "
            "16 bits: it is quantized while it is read (model.quantization), or once for all runs by dora-dist quantize"
        )
    stored: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(settings)
    return stored


def quantized_from(base: str) -> str:
    """The base that ``dora-dist quantize`` has made this base from, by name or absolute path; any other base as it is.

    Args:
        base: a folder, or the name of a model on the Hub, which is returned as it is.
    """
    path = Path(base).expanduser() / "config.json"
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    made_of: str = (config.get("quantization_config") or {}).get(QUANTIZED_FROM, base)
    return made_of


def stays_in_16_bits(model: PreTrainedModel, name: str) -> bool:
    """Whether the base is stored quantized, and this linear layer of it is not.

    Args:
        model: the model without weights, with the configuration that ``load_model_config`` returns.
        name: full name of the layer.
    """
    stored = getattr(model.config, "quantization_config", None)
    return stored is not None and not should_convert_module(name, stored["llm_int8_skip_modules"])


def has_plain_constants(model: PreTrainedModel) -> bool:
    """Whether the base is stored quantized without double quantization, so that its constants are float32.

    Args:
        model: see :func:`stays_in_16_bits`.
    """
    stored = getattr(model.config, "quantization_config", None)
    return stored is not None and not stored["bnb_4bit_use_double_quant"]


def prepare_stored(model: nn.Module, path: str, dtype: torch.dtype) -> None:
    """Let a base that is stored in 4 bits, or a part of it, compute in ``dtype``, in place: convert its unquantized
    weights, and set the dtype that its 4-bit layers dequantize to.

    transformers (5.23) leaves both as they are stored (``HfQuantizer.get_new_dtype`` of a quantized model). If the
    constants of quantized constants are missing, bitsandbytes (0.50.2) takes the latter for unquantized ones
    (``QuantState.from_dict``). This can go when tests/unit/base_model/test_stored_nf4.py passes without it.

    Raises:
        ValueError: constants of quantized constants are missing; the message names the first such layer.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = quantization_state(module)
            if not state.nested and not state.absmax.is_floating_point():
                raise ValueError(
                    f"the model at model.path {path!r} lacks {name}.weight.nested_absmax, without which its weight "
                    "cannot be dequantized: copy or download the model again"
                )
            state.dtype = dtype


def forbid_inference_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    There, the first forward without gradients (an evaluation, say) repacks the weight in place for a kernel that has
    no backward: training afterwards silently gets no gradient through the layer. Seen in bitsandbytes
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
    """Weight ``(out, in)`` that a linear layer computes with, in ``dtype``; dequantized if it is quantized."""
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
    """The weight of a 4-bit layer, with its type; bitsandbytes says only that it is a tensor."""
    return cast(Params4bit, module.weight)


def quantization_state(module: Linear4bit) -> bnb_functional.QuantState:
    """The constants of a 4-bit layer: those of its weight, or those kept by the layer, because codes that ranks gather
    from shards are a plain tensor without them."""
    state = getattr(module.weight, "quant_state", None)
    return cast(bnb_functional.QuantState, module.quant_state if state is None else state)


SAMPLE = 256
"""Number of elements of a weight that ranks compare."""


def keep_for_shards(layer: nn.Module) -> None:
    """Let modules keep what can only be read from a whole weight: its constants, and the sample that ranks compare.

    Args:
        layer: a layer with whole weights.
    """
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            if isinstance(module, Linear4bit):
                module.quant_state = quantization_state(module)
            module.weight_sample = sample_of(module).clone()


def sample_of(module: nn.Module) -> Tensor:
    """The first :data:`SAMPLE` elements of a module's weight as it is stored, even if ranks hold shards of it."""
    kept = vars(module).get("weight_sample")
    if kept is not None:
        return cast(Tensor, kept)
    return cast(Tensor, module.weight).detach().flatten()[:SAMPLE]


def product_dtype(module: nn.Module, output: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies, in forward and backward, given its output or the output's
    gradient."""
    if isinstance(module, Linear4bit) and module.compute_dtype is not None:
        dtype: torch.dtype = module.compute_dtype
        return dtype
    return output.dtype


def is_known_linear(module: nn.Module) -> bool:
    """Whether a layer has the forward of torch's linear layer or of one of bitsandbytes' quantized ones. With another
    forward, the input's gradient may not be ``grad @ weight``."""
    known = (nn.Linear.forward, Linear4bit.forward, Linear8bitLt.forward)
    return getattr(type(module), "forward", None) in known
