"""The sizes of a causal language model that decide how much memory it takes, read from its modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
"""Names of layers that read one tensor; adapted ones are computed together (:mod:`dora_dist.adapter.shared_input`)."""
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
GATED_BLOCK = {*QUERY_KEY_VALUE, "o_proj", *GATED_MLP}
"""Names of the linear layers in a decoder layer built like Llama's."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer: the last part of its name, its sizes, and the number of components that it starts with, whose
    storage never shrinks."""

    kind: str
    in_features: int
    out_features: int
    rank: int = 0
    unquantized: bool = False
    """Whether it stays in 16 bits when the base is quantized: the head, and layers that a base in 4 bits stores so."""
    plain_constants: bool = False
    """Whether its NF4 constants are float32, as in a base that is stored without double quantization."""

    @property
    def adapted(self) -> bool:
        """Whether it has components."""
        return self.rank > 0

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalization: the last part of its name, and the width of its weight."""

    kind: str
    width: int


@dataclass(frozen=True)
class Block:
    """A decoder layer, which gradient checkpointing recomputes as a whole."""

    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    fused_mlp: bool = False
    """Whether its MLP runs as one operation (:mod:`dora_dist.adapter.gated_mlp`)."""

    @property
    def is_known(self) -> bool:
        """Whether it is built like Llama's: attention with four projections, and a gated MLP."""
        return len(self.linears) == len(GATED_BLOCK) and {linear.kind for linear in self.linears} == GATED_BLOCK

    def linear(self, kind: str) -> Linear:
        return next(linear for linear in self.linears if linear.kind == kind)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a causal language model that decide its memory, in elements unless named otherwise."""

    linears: tuple[Linear, ...]
    blocks: tuple[Block, ...]
    hidden_size: int
    vocabulary: int
    heads: int
    embedding_numel: int
    """Elements of input embedding and output head together; tied ones count once."""
    other_numel: int
    """Elements of norms, biases and whatever else is not quantized."""
    buffer_bytes: int
    fused: bool = False
    """Whether the operands of all layers are made at once (:mod:`dora_dist.adapter.components`), and adapted q, k and v
    are computed together."""

    @property
    def num_components(self) -> int:
        """Number of components of all layers at the start."""
        return sum(linear.rank for linear in self.linears)


def has_code_of(function: object, known: Callable[..., Any]) -> bool:
    """Whether a function has the compiled code of a known one; docstring and names of variables may differ."""
    code = _code(function)
    return code is not None and code == _code(known)


def _code(function: object) -> tuple[Any, ...] | None:
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    constants = [None if constant == function.__doc__ else constant for constant in code.co_consts]
    return code.co_code, code.co_names, constants


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module computes ``down_proj(silu(gate_proj(x)) * up_proj(x))``, by the code of its ``forward``: that of
    :class:`_GatedMlp`, which is that of transformers' Llama and of most models of its family."""
    from transformers.activations import SiLUActivation

    if not has_code_of(type(module).forward, _GatedMlp.forward):
        return False
    return isinstance(module.act_fn, nn.SiLU | SiLUActivation)


class _GatedMlp(nn.Module):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: "Tensor") -> "Tensor":
        down_proj: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


def read_shape(skeleton: "PreTrainedModel", ranks: Mapping[str, int], fuse: bool = True) -> ModelShape:
    """The shape of a transformers model.

    Args:
        skeleton: the causal language model; may be on the meta device.
        ranks: full name of an adapted linear layer -> number of components that it starts with.
        fuse: whether adapted layers are computed together where they can be.
    """
    from dora_dist.base_model.quantization import has_plain_constants, stays_in_16_bits

    plain = has_plain_constants(skeleton)
    head, embedding = skeleton.get_output_embeddings(), input_embedding(skeleton)
    linears = {
        name: Linear(
            kind=name.rsplit(".", 1)[-1],
            in_features=module.in_features,
            out_features=module.out_features,
            rank=ranks.get(name, 0),
            unquantized=module is head or stays_in_16_bits(skeleton, name),
            plain_constants=plain,
        )
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
    }
    blocks = []
    for name, module in _decoder_layers(skeleton):
        inside = tuple(linear for path, linear in linears.items() if path.startswith(f"{name}."))
        norms = tuple(
            Norm(kind=path.rsplit(".", 1)[-1], width=part.weight.numel())
            for path, part in module.named_modules()
            if type(part).__name__.endswith("Norm") and getattr(part, "weight", None) is not None
        )
        gated = any(is_gated_mlp(part) for part in module.modules())
        adapted_mlp = all(linear.adapted for linear in inside if linear.kind in GATED_MLP)
        blocks.append(Block(inside, norms, fused_mlp=fuse and gated and adapted_mlp))
    ends = {id(part.weight): part.weight.numel() for part in (embedding, head) if part is not None}
    quantizable = sum(linear.numel for linear in linears.values() if not linear.unquantized)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    return ModelShape(
        linears=tuple(linears.values()),
        blocks=tuple(blocks),
        hidden_size=embedding.embedding_dim,
        vocabulary=embedding.num_embeddings if head is None else head.out_features,
        heads=getattr(skeleton.config.get_text_config(), "num_attention_heads", 1),
        embedding_numel=sum(ends.values()),
        other_numel=total - quantizable - sum(ends.values()),
        buffer_bytes=sum(buffer.nbytes for buffer in skeleton.buffers()),
        fused=fuse,
    )


def positions_of(config: "PreTrainedConfig") -> int | None:
    """Most tokens in a row that a model has positions for; None if there is no bound."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def input_embedding(model: "PreTrainedModel") -> nn.Embedding:
    """The input embedding of a language model, with its type; transformers says only that it is a module."""
    return cast(nn.Embedding, model.get_input_embeddings())


def text_decoder(model: nn.Module) -> str:
    """Full name of the text decoder in a model that takes images or sound as well; empty for a text-only model, with or
    without an encoder."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return ""
    if model.config.get_text_config(decoder=True) is model.config:
        return ""
    decoder = model.get_decoder()
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(decoder)]


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    """A linear layer, quantized or not, by its full name, with its type; torch says only that it is a module."""
    return cast(nn.Linear, model.get_submodule(name))


def _decoder_layers(skeleton: "PreTrainedModel") -> list[tuple[str, nn.Module]]:
    """The entries of the longest module list, with full names; within the text decoder, if there is more than text."""
    prefix = text_decoder(skeleton)
    lists = [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(prefix)
    ]
    if not lists:
        return []
    name, longest = max(lists, key=lambda entry: len(entry[1]))
    return [(f"{name}.{number}", module) for number, module in enumerate(longest)]
