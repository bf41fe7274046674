"""Tiny random language models of many architectures, by a name of their own."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from support import tiny_models
from support.tiny_models import VOCABULARY
from support.tiny_run import tiny_tokenizer

SIZES: dict[str, Any] = {
    **tiny_models.SIZES,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {"shared_expert_intermediate_size": 64}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "num_key_value_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"ffn_hidden_size": 128}
ATTENTION = {"query_pre_attn_scalar": 16}


def _of(kind: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    return kind, {**SIZES, **changes}


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        kind: _of(kind)
        for kind in (
            *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "gpt_neox", "llama", "ministral"),
            *("nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"),
            "starcoder2",
        )
    },
    **{kind: _of(kind, **EXPERTS) for kind in ("gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen3_moe")},
    "bloom": ("bloom", {**ENDS, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "deepseek_v2": _of("deepseek_v2", **ROUTED, **LATENT),
    "deepseek_v3": _of("deepseek_v3", **ROUTED, **LATENT),
    "ernie4_5_moe": _of("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_layer_start_index=1),
    "falcon": ("falcon", WITHOUT_HEAD_DIM),
    "falcon_h1": _of(
        "falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16
    ),
    "gemma2": _of("gemma2", **ATTENTION),
    "gemma3": _of("gemma3_text", **ATTENTION),
    "gemma3 with a tower": (
        "gemma3",
        {
            "text_config": {**SIZES, **ATTENTION},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
    ),
    "gemma4": _of(
        "gemma4_text",
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        num_global_key_value_heads=2,
    ),
    "glm4_moe": _of("glm4_moe", **ROUTED),
    "gpt2": ("gpt2", {**ENDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "granite": _of("granite", logits_scaling=8.0, attention_multiplier=0.25, residual_multiplier=0.5),
    "granitemoehybrid": _of(
        "granitemoehybrid", **EXPERTS, layer_types=["attention", "attention"], shared_intermediate_size=64
    ),
    "hunyuan": _of("hunyuan_v1_dense"),
    "lfm2": _of("lfm2", num_hidden_layers=3, full_attn_idxs=[1], layer_types=["conv", "full_attention", "conv"]),
    "llama4": _of("llama4_text", **EXPERTS, intermediate_size_mlp=128, interleave_moe_layer_step=1),
    "llama tied": _of("llama", tie_word_embeddings=True),
    "llama with biases": _of("llama", attention_bias=True, mlp_bias=True),
    "mamba2": (
        "mamba2",
        {**ENDS, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "expand": 2}
        | {"state_size": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "mistral": _of("mistral", sliding_window=8),
    "mpt": ("mpt", {**ENDS, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2}),
    "opt": (
        "opt",
        {**ENDS, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 256, "word_embed_proj_dim": 64},
    ),
    "qwen2_moe": _of("qwen2_moe", **EXPERTS, **SHARED),
    "qwen3.5": _of("qwen3_5_text", **LINEAR_ATTENTION),
    "qwen3_next": _of("qwen3_next", **{**EXPERTS, **SHARED, **LINEAR_ATTENTION}),
}


def config_of(name: str) -> PreTrainedConfig:
    kind, sizes = ARCHITECTURES[name]
    return CONFIG_MAPPING[kind](**sizes)


def skeleton_of(name: str) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name))


@torch.no_grad()
def save_model(name: str, folder: Path) -> Path:
    """A random model in float32 with a tokenizer; weights large enough that the output depends on the input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(name)).float()
        for path, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in path:
                parameter.mul_(4)
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
