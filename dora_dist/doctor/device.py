"""Tests the devices of this process with real arithmetic instead of version checks."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from dora_dist.doctor.facts import Check, Gpu

ROWS, IN_FEATURES, OUT_FEATURES = 16, 256, 128
MATMUL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest error of a product, relative in the Frobenius norm. Loose enough for TF32; a wrong kernel is off by 1."""
LAYER_TOLERANCE = {"nf4": 1e-2, "int8": 5e-2, "none": 1e-3}
"""The same for a layer against its own dequantized weight; int8 also quantizes the input. bfloat16 adds its own."""
QUANTIZATION_TOLERANCE = {"nf4": 0.15, "int8": 0.02, "none": 0.01}
"""The same for the dequantized weight against the original: normal weights give 0.09 in NF4 and 0.007 in int8."""


def describe_gpus(devices: Sequence[torch.device]) -> tuple[Gpu, ...]:
    """The GPUs among the devices. Must be called before they are used, so that missing memory is what others hold.

    A GPU that does not respond is not included: the arithmetic on it fails too, and reports why.
    """
    found = []
    for device in devices:
        if device.type == "cuda":
            with suppress(RuntimeError):
                found.append(_describe(device))
    return tuple(found)


def _describe(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(
        name=properties.name,
        uuid=str(properties.uuid),
        total=total,
        free=free,
        capability=f"{properties.major}.{properties.minor}",
        native_bf16=native,
    )


def check_device(device: torch.device, dtype: torch.dtype, quantization: str) -> tuple[Check, ...]:
    """Test a matrix product in the compute dtype, and forward and backward of a quantized layer.

    Args:
        device: device to test.
        dtype: dtype of the computation; pass float32 if training would fall back to it.
        quantization: quantization of the base, as in the configuration.
    """
    name = str(dtype).removeprefix("torch.")
    return (
        _attempt(f"{name} matmul", device, lambda: check_matmul(device, dtype)),
        _attempt(f"{quantization} layer", device, lambda: check_layer(device, dtype, quantization)),
    )


def check_matmul(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Error of a product and the largest allowed one; the reference is float64 on the CPU."""
    left, right = _random(ROWS, IN_FEATURES), _random(IN_FEATURES, OUT_FEATURES)
    product = left.to(device, dtype) @ right.to(device, dtype)
    return _error(product, left.double() @ right.double()), MATMUL_TOLERANCE[dtype]


def check_layer(device: torch.device, dtype: torch.dtype, quantization: str) -> tuple[float, float]:
    """Quantize a linear layer; compare its output and input gradient with its dequantized weight, and that weight with
    the original. Returns the largest of the three errors, each as a share of the allowed one, and 1."""
    from dora_dist.base_model.quantization import dequantized_weight

    weight = _random(OUT_FEATURES, IN_FEATURES)
    layer = _quantized(weight, device, dtype, quantization)
    x = _random(ROWS, IN_FEATURES).to(device, dtype).requires_grad_()
    gradient = _random(ROWS, OUT_FEATURES).to(device, dtype)
    output = layer(x)
    output.backward(gradient)
    used = dequantized_weight(layer).cpu().double()
    allowed = LAYER_TOLERANCE[quantization] + MATMUL_TOLERANCE[dtype]
    errors = (
        _error(output, x.detach().cpu().double() @ used.T) / allowed,
        _error(x.grad, gradient.cpu().double() @ used) / allowed,
        _error(used, weight.double()) / QUANTIZATION_TOLERANCE[quantization],
    )
    return max(errors), 1.0


def _quantized(weight: Tensor, device: torch.device, dtype: torch.dtype, quantization: str) -> nn.Linear:
    # Imported here, so that a bitsandbytes that cannot be loaded is a finding and does not end the command.
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    from dora_dist.base_model.quantization import forbid_inference_packing

    out_features, in_features = weight.shape
    if quantization == "nf4":
        layer: nn.Linear = Linear4bit(
            in_features, out_features, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
        )
    elif quantization == "int8":
        layer = Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
    else:
        layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    layer.load_state_dict({"weight": weight})
    layer.requires_grad_(False)
    forbid_inference_packing(layer)
    return layer.to(device)


def _attempt(name: str, device: torch.device, measure: Callable[[], tuple[float, float]]) -> Check:
    """Any error on a device is a finding, including a library that cannot be loaded."""
    try:
        error, allowed = measure()
    except Exception as failure:
        return Check(name=name, failure=f"{type(failure).__name__} on {device}: {_first_line(failure)}")
    if not error <= allowed:  # NaN is wrong too
        return Check(name=name, failure=f"on {device} the result is off by {error:.2g}, and {allowed:.2g} is allowed")
    return Check(name=name, detail="right")


def _first_line(failure: Exception) -> str:
    return next(iter(str(failure).strip().splitlines()), "no message")


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def _error(found: Tensor | None, expected: Tensor) -> float:
    """Relative error of a tensor in the Frobenius norm; NaN if there is no tensor."""
    if found is None:
        return float("nan")
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())
