"""Bytes that a decoder layer keeps for its backward, and that it needs besides: arithmetic on shapes.

Which tensors each operation saves, and which of them are the same tensor, was read from the source of torch 2.13,
transformers 5.23, bitsandbytes 0.50.2 and our own layer. tests/unit/memory/test_estimate.py compares the results with
an allocator.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dora_dist.base_model.shape import GATED_MLP, QUERY_KEY_VALUE, Block, Linear, ModelShape, Norm

FLOAT32 = 4
NF4_BLOCK = 64
"""Number of weights that share a constant; transformers makes and stores no other blocks."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter's numbers.

    Args:
        bytes_per_element: bytes per element of its parameters and of their gradients.
        dropout: whether the components' input passes through dropout.
        trained_gates: whether the gates have gradients.
        penalty: whether the equilibrium penalty is on: its backward comes first, so all gradients exist from then on.
        masked: whether components are pruned during training.
        watched: whether the criterion keeps values and gradients of a step
            (:class:`~dora_dist.training.criterion.LossChange`).
    """

    bytes_per_element: int
    dropout: bool
    trained_gates: bool = True
    penalty: bool = True
    masked: bool = False
    watched: bool = False

    def numel(self, shape: ModelShape) -> int:
        """Number of elements of all components."""
        return sum(linear.rank * (linear.in_features + linear.out_features + 1) for linear in shape.linears)

    def trained_numel(self, shape: ModelShape) -> int:
        """Number of elements that have a gradient."""
        return self.numel(shape) - (0 if self.trained_gates else shape.num_components)

    def nbytes(self, shape: ModelShape) -> int:
        """Bytes of parameters, of masks (one byte per component), and of what a criterion keeps."""
        watched = (self.bytes_per_element + FLOAT32) * self.trained_numel(shape) if self.watched else 0
        return self.bytes_per_element * self.numel(shape) + shape.num_components + watched


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one device.

    Args:
        rows: number of rows.
        length: number of tokens in each row.
        compute_bytes: bytes per element of an activation.
        attention: kind of attention: ``sdpa``, ``eager`` or ``flash``.
        padded: whether rows differ in length or hold several examples, so that attention needs a mask.
        autocast: whether torch's autocast is on: float32 adapters then compute on copies in the compute dtype.
    """

    rows: int
    length: int
    compute_bytes: int
    attention: Literal["sdpa", "eager", "flash"] = "sdpa"
    padded: bool = False
    autocast: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Activations of one decoder layer, in bytes.

    Args:
        saved: activations kept for its backward, including its input (as the normalization keeps it).
        input: part of ``saved`` that a model's first layer does not keep, because nothing below it is trained.
        forward: need beyond ``saved`` at the end of its forward, and therefore when it is recomputed.
        backward: largest need of its backward beyond ``saved``.
        dequantized: part of ``backward``: the largest dequantized weight, if it exists at the peak.
        gradients: gradients of its components, which stay from its backward until those of all layers are made.
    """

    saved: int = 0
    input: int = 0
    forward: int = 0
    backward: int = 0
    dequantized: int = 0
    gradients: int = 0


def block_memory(block: Block, shape: ModelShape, batch: Batch, adapter: Adapter, quantization: str) -> BlockMemory:
    """Activations of a decoder layer. If it is not built like Llama's, they are taken to be the inputs and outputs of
    its linear layers."""
    if not block.is_known:
        return _unknown_block(block, shape, batch, adapter, quantization)
    kept = _KeptInputs(block, batch, adapter, quantization)
    size = batch.compute_bytes
    inner = batch.tokens * block.linear("gate_proj").out_features * size
    gradient = batch.tokens * shape.hidden_size * size
    norms = [_norm(norm, block, batch.tokens) for norm in block.norms]
    attention, attention_backward = _attention(block, shape, batch)
    # The kernels other than eager keep their output anyway.
    after_attention = kept.masks("o_proj") + (kept.shared("o_proj") if batch.attention == "eager" else 0)
    product = kept.shared("down_proj")
    down_mask = kept.masks("down_proj")
    # The activation function keeps the gate; the product with up keeps both factors. Fused, only gate and up stay.
    mlp = 2 * inner if block.fused_mlp else 3 * inner + product
    mlp += kept.shared("gate_proj", "up_proj") + kept.masks("gate_proj", "up_proj", together=block.fused_mlp)
    mlp += down_mask
    attention += kept.shared(*QUERY_KEY_VALUE) + kept.masks(*QUERY_KEY_VALUE, together=shape.fused) + after_attention
    low_rank = sum(_low_rank(linear, shape, batch, adapter) for linear in block.linears)
    down = block.linear("down_proj")
    weight = _dequantized(down, quantization, size)

    def done(*kinds: str) -> int:
        return component_gradients([block.linear(kind) for kind in kinds], shape, batch, adapter)

    # Activation and product, computed again.
    again = 2 * inner if block.fused_mlp else 0
    backward, dequantized = max(
        # (total, dequantized weight in it) while down_proj makes the gradient of its input
        (gradient + again + inner + weight, weight),
        # while its components add theirs
        (gradient + again + inner + _components_backward(down, batch, adapter), 0),
        # gradients of the product of gate and up, and of the two factors; nothing of down_proj is left
        (gradient - down_mask + 3 * inner - (0 if block.fused_mlp else product) + done("down_proj"), 0),
        # attention; nothing of what came after it is left
        (gradient - mlp - after_attention + attention_backward + done(*GATED_MLP, "o_proj"), 0),
    )
    return BlockMemory(
        saved=sum(norms) + attention + mlp + low_rank,
        input=sum(norms[:1]),
        forward=_end_of_forward(block, shape, batch, adapter, kept),
        backward=backward,
        dequantized=dequantized,
        gradients=component_gradients(block.linears, shape, batch, adapter),
    )


@dataclass(frozen=True)
class _KeptInputs:
    """Bytes that linear layers of one decoder layer keep of their inputs. ``kinds`` always read the same tensor."""

    block: Block
    batch: Batch
    adapter: Adapter
    quantization: str

    def shared(self, *kinds: str) -> int:
        """Bytes of the tensor itself, counted once, if any of them keeps it."""
        linears = [self.block.linear(kind) for kind in kinds]
        kept = any(linear.adapted for linear in linears) or self.quantization == "int8"
        return self.batch.tokens * linears[0].in_features * self.batch.compute_bytes if kept else 0

    def masks(self, *kinds: str, together: bool = False) -> int:
        """Bytes of their dropout masks, one byte per entry; one mask if they are computed together."""
        sizes = [_dropout_mask(self.block.linear(kind), self.batch, self.adapter) for kind in kinds]
        return max(sizes) if together else sum(sizes)


def _end_of_forward(block: Block, shape: ModelShape, batch: Batch, adapter: Adapter, kept: _KeptInputs) -> int:
    """Bytes that the MLP holds beyond what is saved, while the components of down_proj compute."""
    gate, down = block.linear("gate_proj"), block.linear("down_proj")
    base_output = batch.tokens * shape.hidden_size * batch.compute_bytes
    unsaved = 0
    for kinds, linear in ((("gate_proj", "up_proj"), gate), (("down_proj",), down)):
        if not kept.shared(*kinds) or (linear is down and block.fused_mlp):
            unsaved += batch.tokens * linear.in_features * batch.compute_bytes
    copies = _input_copies(down, batch, adapter) * batch.tokens * down.in_features
    return base_output + unsaved + copies


def _unknown_block(block: Block, shape: ModelShape, batch: Batch, adapter: Adapter, quantization: str) -> BlockMemory:
    tokens, size = batch.tokens, batch.compute_bytes
    saved = sum(_norm(norm, block, tokens) for norm in block.norms)
    for linear in block.linears:
        saved += tokens * (linear.in_features + linear.out_features) * size
        saved += _dropout_mask(linear, batch, adapter) + _low_rank(linear, shape, batch, adapter)
    weight = max((_dequantized(linear, quantization, size) for linear in block.linears), default=0)
    widest = max((linear.out_features for linear in block.linears), default=0)
    backward = 2 * tokens * widest * size + weight
    gradients = component_gradients(block.linears, shape, batch, adapter)
    return BlockMemory(saved=saved, backward=backward, dequantized=weight, gradients=gradients)


def _norm(norm: Norm, block: Block, tokens: int) -> int:
    """Bytes that a normalization keeps: its input in float32 (a copy, unless it is float32 already) and a factor per
    vector."""
    projection = {"q_norm": "q_proj", "k_norm": "k_proj"}.get(norm.kind)
    width = block.linear(projection).out_features if projection and block.is_known else norm.width
    return FLOAT32 * tokens * (width + width // norm.width)


def _attention(block: Block, shape: ModelShape, batch: Batch) -> tuple[int, int]:
    """Bytes that attention saves between its projections, and that its backward needs beyond what the layer saves."""
    query, key, value = (block.linear(kind).out_features for kind in QUERY_KEY_VALUE)
    tokens, size = batch.tokens, batch.compute_bytes
    # With a mask, transformers repeats keys and values for every head (integrations/sdpa_attention.py).
    repeated = batch.attention == "eager" or (batch.attention == "sdpa" and batch.padded)
    keys, values = (query, query) if repeated else (key, value)
    saved = tokens * (query + keys + values) * size
    backward = tokens * (2 * query + keys + values) * size
    square = batch.rows * batch.length**2
    if batch.attention == "eager":
        scores = shape.heads * square
        copy = 0 if size == FLOAT32 else size * scores
        # In the softmax's backward: gradients of its output and input, of values, and of attention's output.
        return saved + FLOAT32 * scores + copy, 2 * tokens * query * size + 2 * FLOAT32 * scores - copy
    # The kernels keep their output, and a number per row of scores.
    saved += tokens * query * size + FLOAT32 * tokens * shape.heads
    if batch.attention == "sdpa" and batch.padded:
        # torch turns the boolean mask into an additive one, again in every layer, and keeps it for the backward.
        saved += square * size
    return saved, backward


def kept_int8_inputs(block: Block, batch: Batch) -> int:
    """Bytes of the inputs of a decoder layer's linear layers that have no components."""
    bare = [linear for linear in block.linears if not linear.adapted]
    widths = sum(linears[0].in_features for linears in read_together(block, bare))
    return batch.tokens * widths * batch.compute_bytes


def read_together(block: Block, linears: Sequence[Linear]) -> list[list[Linear]]:
    """Linear layers of a decoder layer, grouped by the tensor that they read."""
    together = dict.fromkeys(QUERY_KEY_VALUE, "attention") | dict.fromkeys(("gate_proj", "up_proj"), "mlp")
    groups: dict[object, list[Linear]] = {}
    for number, linear in enumerate(linears):
        groups.setdefault(together.get(linear.kind, linear.kind) if block.is_known else number, []).append(linear)
    return list(groups.values())


def _computing_bytes(batch: Batch, adapter: Adapter) -> int:
    return batch.compute_bytes if batch.autocast else adapter.bytes_per_element


def _dropout_mask(linear: Linear, batch: Batch, adapter: Adapter) -> int:
    return batch.tokens * linear.in_features if linear.adapted and adapter.dropout else 0


def _low_rank(linear: Linear, shape: ModelShape, batch: Batch, adapter: Adapter) -> int:
    """Bytes of the components' activations and, if the layer makes its operands itself, of rows and columns and the
    copy that columns are made from."""
    if not linear.adapted:
        return 0
    size = _computing_bytes(batch, adapter)
    own = 0
    if not shape.fused:
        own = (linear.in_features + linear.out_features) * size + linear.out_features * adapter.bytes_per_element
    return linear.rank * (batch.tokens * size + own)


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Parameters of all layers side by side, and operands made from them (:mod:`dora_dist.adapter.components`).

    Args:
        parameters: bytes of the copies of parameters, which the equilibrium penalty reads too.
        components: bytes of rows and columns that layers multiply with, unless they are those copies.
        largest: number of elements of the largest stack.
    """

    parameters: int
    components: int
    largest: int

    @classmethod
    def of(cls, shape: ModelShape, batch: Batch, adapter: Adapter) -> "SideBySide":
        """The sizes, if operands are made for all layers at once."""
        by_width: Counter[int] = Counter()
        by_output: Counter[int] = Counter()
        for linear in shape.linears:
            by_width[linear.in_features] += linear.rank * linear.in_features
            by_output[linear.out_features] += linear.rank * linear.out_features
        size = _computing_bytes(batch, adapter)
        copied_rows = adapter.masked or size != adapter.bytes_per_element
        return cls(
            parameters=adapter.bytes_per_element * adapter.numel(shape),
            components=size * (by_output.total() + copied_rows * by_width.total()),
            largest=max((*by_width.values(), *by_output.values()), default=0),
        )


def component_gradients(linears: Sequence[Linear], shape: ModelShape, batch: Batch, adapter: Adapter) -> int:
    """Bytes of the gradients of rows and columns that wait for those of all layers; 0 unless operands are made for all
    layers at once."""
    if not shape.fused:
        return 0
    elements = sum(linear.rank * (linear.in_features + linear.out_features) for linear in linears)
    return elements * _computing_bytes(batch, adapter)


def _input_copies(linear: Linear, batch: Batch, adapter: Adapter) -> int:
    """Bytes per entry of a layer's input for the components' temporary copies: in their dtype, and after dropout."""
    if not linear.adapted:
        return 0
    size = _computing_bytes(batch, adapter)
    return size * ((size != batch.compute_bytes) + adapter.dropout)


def _components_backward(linear: Linear, batch: Batch, adapter: Adapter) -> int:
    """Bytes beside the gradients of output and input: copies of the output's gradient and of the input in the
    components' dtype, the input after dropout, and the components' part of the input's gradient if it is not added in
    place."""
    if not linear.adapted:
        return 0
    size = _computing_bytes(batch, adapter)
    other = size != batch.compute_bytes
    output = batch.tokens * linear.out_features * size * other
    added = size * (adapter.dropout + (adapter.dropout or other))
    return output + batch.tokens * linear.in_features * max(_input_copies(linear, batch, adapter), added)


def _dequantized(linear: Linear, quantization: str, compute_bytes: int) -> int:
    if quantization == "none" or linear.unquantized:
        return 0
    # Quantized constants of NF4 are first dequantized into float32, and then shifted into a copy.
    nested = quantization == "nf4" and not linear.plain_constants
    constants = FLOAT32 * math.ceil(linear.numel / NF4_BLOCK) if nested else 0
    return linear.numel * compute_bytes + constants
