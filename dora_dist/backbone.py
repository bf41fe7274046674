"""Loading the frozen base model and its tokenizer."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dora_dist.loading import check_loaded, lean_loading
from dora_dist.quantization import forbid_inference_packing, quantization_config


def find_model(path: str) -> str:
    """The model that a configuration names: a folder (``~`` expanded), or a name on the Hub as it is.

    Raises:
        ValueError: ``path`` looks like a local path and there is no ``config.json`` in it.
    """
    local = path.startswith((".", "/", "~")) or os.path.isdir(path)
    if local and not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(
            f"model.path {path!r} holds no config.json: point it to a folder in the Hugging Face layout, or give the "
            "name of a model on the Hub"
        )
    return str(Path(path).expanduser()) if local else path


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn a failure to find or read a model into an error that names the key to mend.

    Raises:
        ValueError: instead of the ``OSError`` that transformers raises, for a name that is on no hub too, and of
            the errors for a file of weights, or their index, that is cut off.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"model.path {path!r} cannot be read, neither as a folder (looked from {Path.cwd()}) nor from the Hub: "
            f"{error}"
        ) from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the weights at model.path {path!r} cannot be read: {error}; copy or download the model again"
        ) from None


def resolve_compute_dtype(name: str) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU that has it, otherwise float32 (bfloat16 is far slower on most CPUs)."""
    if name == "auto":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, name)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (the end-of-sequence token where it has none of its own)."""
    with _reading(path):
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """transformers' configuration of the model.

    Raises:
        ValueError: the path is not usable.
    """
    with _reading(path):
        return AutoConfig.from_pretrained(find_model(path), trust_remote_code=trust_remote_code)


def load_skeleton(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights (on the meta device): enough to find its layers, at no cost.

    Raises:
        ValueError: the path is not usable.
    """
    config = load_model_config(path, trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_backbone(
    path: str,
    quantization: str = "nf4",
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model, quantized while it is read, tensor by tensor, on one device, frozen.

    Args:
        path: folder in the Hugging Face layout, or a name on the Hub.
        quantization: ``nf4``, ``int8`` or ``none``.
        compute_dtype: of activations and of all weights that are not quantized.
        device: where the whole model goes (every rank holds all of it).
        attention: transformers' attention implementation; ``None`` for its default.
        trust_remote_code: run model code that comes with the model.

    Raises:
        ValueError: the path or the quantization is not usable, or the weights are not those that the model needs.
    """
    config = load_model_config(path, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the model at {path!r} is stored quantized; give the 16-bit model, it is quantized on loading"
        )
    unchanged = quantization == "none" and torch.device(device).type == "cpu" and config.dtype == compute_dtype
    with _reading(path), lean_loading(shared=unchanged):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            find_model(path),
            config=config,
            quantization_config=quantization_config(quantization, compute_dtype),
            dtype=compute_dtype,
            device_map={"": device},
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told better by check_loaded
        )
    check_loaded(model, path, loading_info)
    forbid_inference_packing(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    return model
