"""The configuration of the base model: plain values, without torch, which takes seconds to import."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dora_dist.config.checks import nearest, require

Quantization = Literal["nf4", "int8", "none"]
KERNELS = ("rms_norm", "rope", "swiglu")
"""Operations that have a kernel (:mod:`dora_dist.base_model.kernels`)."""
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
ROPE_TYPES = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Scalings of rotary positions that are the same for every row, by transformers' names -> the numbers that each needs.
(The others, dynamic and longrope, depend on the longest row of a batch.)"""
ORIGINAL_POSITIONS = "original_max_position_embeddings"
ROPE_OPTIONS = {
    "linear": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": (),
}
"""Scaling -> the numbers that it may have beside those, and beside :data:`ORIGINAL_POSITIONS`."""
RecomputeLayers = Literal["auto", "all", "none"] | int


@dataclass(kw_only=True)
class ModelConfig:
    """The frozen base model.

    Args:
        path: folder in the Hugging Face layout, or name of a model on the Hub.
        quantization: nf4 (4 bits, double quantization), int8, or none.
        compute_dtype: dtype of activations and unquantized weights; auto is bfloat16 on a GPU and float32 on a CPU.
        attention: transformers' attention implementation, such as sdpa or flash_attention_2; null for its default.
        trust_remote_code: run the Python code that comes with the model.
        allow_unquantized: accept a quantized model of which more than a fifth of the block weights stays in 16 bits, as
            the experts of most mixture-of-experts models do.
        fuse: compute some modules of the base together, such as a gated MLP or q, k and v, and the loss without its
            logits; docs/architecture.md lists them. With false, every module runs its own forward: slower, with more
            memory, equal up to rounding. A resumed run may change it.
        recompute_layers: layers whose activations are recomputed in the backward pass, which saves memory and costs
            time: all, none, a number (the first ones), or auto (as few as fit on the GPUs, by the estimate; see
            docs/performance.md). null follows training.activation_checkpointing. A resumed run may change it.
        rope_scaling: scaling of rotary positions, for rows longer than those that the model was trained on, as
            transformers 5 writes it in the rope_parameters of a config.json, such as {rope_type: yarn, factor: 4.0}.
            rope_type is linear, yarn or llama3; rows may then have factor times the original positions
            (original_max_position_embeddings, by default the model's). null for what the model has.
        kernels: auto uses Liger's kernels for RMSNorm, RoPE and SwiGLU, on a GPU with the packages of dora-dist[gpu],
            each where a trial on the model gives the model's own numbers; none never uses them, nor does fuse false. A
            resumed run may change it.
    """

    path: str
    quantization: Quantization = "nf4"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: str | None = None
    trust_remote_code: bool = False
    allow_unquantized: bool = False
    fuse: bool = True
    recompute_layers: RecomputeLayers | None = None
    kernels: Literal["auto", "none"] = "auto"
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.rope_scaling is not None:
            check_rope(self.rope_scaling)
        given = self.recompute_layers
        # A bool is an int to isinstance.
        fits = given is None or isinstance(given, str) or (type(given) is int and given >= 0)
        require(fits, "model.recompute_layers", given, "be auto, all, none, or a number of layers")


def check_rope(scaling: dict[str, Any]) -> None:
    """Refuse a scaling of rotary positions that has no meaning.

    Raises:
        ValueError: ``rope_type`` is unknown, or a number is missing or impossible.
    """
    name = "model.rope_scaling"
    kind = str(scaling.get("rope_type"))
    require(kind in ROPE_TYPES, f"{name}: rope_type", kind, f"be one of {', '.join(ROPE_TYPES)}")
    known = ("rope_type", ORIGINAL_POSITIONS, *ROPE_TYPES[kind], *ROPE_OPTIONS[kind])
    for key in scaling:
        if key not in known:
            raise ValueError(f"{name} has {key!r}, which rope_type {kind} does not read{nearest(key, known)}")
    for key in ROPE_TYPES[kind]:
        require(key in scaling, f"{name}: {key}", None, f"be a number, which rope_type {kind} needs")
    for key, value in scaling.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(key == "rope_type" or is_number, f"{name}: {key}", value, "be a number, and finite")
    require(scaling["factor"] >= 1, f"{name}: factor", scaling["factor"], "be at least 1")
    original = scaling.get(ORIGINAL_POSITIONS, 1)
    require(
        original >= 1 and original == int(original),
        f"{name}: {ORIGINAL_POSITIONS}",
        original,
        "be a whole number above 0",
    )
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    require(low < high, f"{name}: low_freq_factor", low, f"be less than high_freq_factor, {high}")
