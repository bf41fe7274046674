"""The configuration of the base model: plain values, without torch, which takes seconds to import."""

from dataclasses import dataclass
from typing import Literal, get_args

from dora_dist.config.checks import require

Quantization = Literal["nf4", "int8", "none"]
KERNELS = ("rms_norm", "rope", "swiglu")
"""Operations that have a kernel (:mod:`dora_dist.base_model.kernels`)."""
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
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
        fuse: compute a gated MLP as one operation, q, k and v of an attention together, the loss of a causal language
            model without its logits, and cast what a trained head reads. With false, every module of the base runs its
            own forward: slower, with more memory, equal up to rounding. A resumed run may change it.
        recompute_layers: layers whose activations are recomputed in the backward pass, which saves memory and costs
            time; the numbers stay the same. all, none, a number of layers (the first ones), or auto: as few layers as
            fit on the smallest GPU of the run by the estimate, with 15 % left free; all of them where the memory is
            not known, as on CPUs. null follows training.activation_checkpointing. A resumed run may change it.
        kernels: auto uses Liger's kernels for RMSNorm, RoPE and SwiGLU, on a GPU with the packages of dora-dist[gpu],
            each where a trial on the model gives the model's own numbers; none never uses them. fuse false turns them
            off. A resumed run may change it.
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

    def __post_init__(self) -> None:
        given = self.recompute_layers
        # A bool is an int to isinstance.
        fits = given is None or isinstance(given, str) or (type(given) is int and given >= 0)
        require(fits, "model.recompute_layers", given, "be auto, all, none, or a number of layers")
