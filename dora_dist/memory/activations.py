"""What a decoder layer keeps for its backward, and what it needs beside that, in bytes: arithmetic on shapes.

Read from the source of torch 2.13, transformers 5.23, bitsandbytes 0.50.2 and of our own layer: which tensors each
operation saves, and which of them are the same tensor. tests/unit/memory/test_estimate.py compares with an allocator.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dora_dist.base_model.shape import GATED_MLP, QUERY_KEY_VALUE, Block, Linear, ModelShape, Norm

FLOAT32 = 4
NF4_BLOCK = 64
"""Weights that share a constant; transformers writes and makes no other blocks."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter's numbers.

    Args:
        bytes_per_element: of its parameters and their gradients.
        dropout: whether the components' input passes through dropout.
        trained_gates: whether the gates have gradients.
        penalty: whether the equilibrium penalty is on: its backward comes first, so that all gradients exist from then.
        masked: whether components are pruned on the way.
        watched: whether what is trained is judged by its movement, which keeps values and gradients of a step
            (:class:`~dora_dist.training.criterion.LossChange`).
    """

    bytes_per_element: int
    dropout: bool
    trained_gates: bool = True
    penalty: bool = True
    masked: bool = False
    watched: bool = False

    def numel(self, shape: ModelShape) -> int:
        """Elements of all components."""
        return sum(linear.rank * (linear.in_features + linear.out_features + 1) for linear in shape.linears)

    def trained_numel(self, shape: ModelShape) -> int:
        """Elements that have a gradient."""
        return self.numel(shape) - (0 if self.trained_gates else shape.num_components)

    def nbytes(self, shape: ModelShape) -> int:
        """Parameters and masks (a byte per component), and what a criterion keeps of them."""
        watched = (self.bytes_per_element + FLOAT32) * self.trained_numel(shape) if self.watched else 0
        return self.bytes_per_element * self.numel(shape) + shape.num_components + watched


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one device.

    Args:
        rows: examples.
        length: tokens of each.
        compute_bytes: per element of an activation.
        attention: ``sdpa``, ``eager`` or ``flash``.
        padded: rows differ in length, or hold several examples, so that attention needs a mask.
        autocast: torch's autocast is on: float32 adapters compute on copies in the compute dtype.
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
        saved: for its backward, its input (as the normalization keeps it) included.
        input: of these, what the first layer of a model does not keep, as nothing below it is trained.
        forward: needed beyond ``saved`` at the end of its forward, and so when it is recomputed.
        backward: the most its backward needs beyond ``saved``.
        dequantized: of ``backward``: the largest dequantized weight, where that is at the peak.
        gradients: of its components, which are there from its backward on until gradients of all layers are made.
    """

    saved: int = 0
    input: int = 0
    forward: int = 0
    backward: int = 0
    dequantized: int = 0
    gradients: int = 0


def block_memory(block: Block, shape: ModelShape, batch: Batch, adapter: Adapter, quantization: str) -> BlockMemory:
    """Activations of a decoder layer. Where it is built unlike Llama's: by inputs and outputs of its linear layers."""
    if not block.is_known:
        return _unknown_block(block, shape, batch, adapter, quantization)
    kept = _KeptInputs(block, batch, adapter, quantization)
    size = batch.compute_bytes
    inner = batch.tokens * block.linear("gate_proj").out_features * size
    gradient = batch.tokens * shape.hidden_size * size
    norms = [_norm(norm, block, batch.tokens) for norm in block.norms]
    attention, attention_backward = _attention(block, shape, batch)
    # The other kernels keep their output anyway.
    after_attention = kept.masks("o_proj") + (kept.shared("o_proj") if batch.attention == "eager" else 0)
    product = kept.shared("down_proj")
    down_mask = kept.masks("down_proj")
    # The activation function keeps the gate; its product with up, both factors. Fused, gate and up are all.
    mlp = 2 * inner if block.fused_mlp else 3 * inner + product
    mlp += kept.shared("gate_proj", "up_proj") + kept.masks("gate_proj", "up_proj", together=block.fused_mlp)
    mlp += down_mask
    attention += kept.shared(*QUERY_KEY_VALUE) + kept.masks(*QUERY_KEY_VALUE, together=shape.fused) + after_attention
    low_rank = sum(_low_rank(linear, shape, batch, adapter) for linear in block.linears)
    down = block.linear("down_proj")
    weight = _dequantized(down, quantization, size)

    def done(*kinds: str) -> int:
        return component_gradients([block.linear(kind) for kind in kinds], shape, batch, adapter)

    # Beside gradients: activation and product, computed again.
    again = 2 * inner if block.fused_mlp else 0
    backward, dequantized = max(
        # (in all, of that the dequantized weight) while down_proj makes the gradient of its input
        (gradient + again + inner + weight, weight),
        # while its components add theirs
        (gradient + again + inner + _components_backward(down, batch, adapter), 0),
        # the gradient of the product of gate and up, and those of the factors; nothing of down_proj is left
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
    """What linear layers of one decoder layer keep of their inputs; asked by kinds that read the same tensor."""

    block: Block
    batch: Batch
    adapter: Adapter
    quantization: str

    def shared(self, *kinds: str) -> int:
        """The tensor itself, once, where one of them keeps it."""
        linears = [self.block.linear(kind) for kind in kinds]
        kept = any(linear.adapted for linear in linears) or self.quantization == "int8"
        return self.batch.tokens * linears[0].in_features * self.batch.compute_bytes if kept else 0

    def masks(self, *kinds: str, together: bool = False) -> int:
        """The dropout mask of each, a byte an entry; one where they are computed together."""
        sizes = [_dropout_mask(self.block.linear(kind), self.batch, self.adapter) for kind in kinds]
        return max(sizes) if together else sum(sizes)


def _end_of_forward(block: Block, shape: ModelShape, batch: Batch, adapter: Adapter, kept: _KeptInputs) -> int:
    """What the MLP holds beside what is saved, while the components of down_proj compute."""
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
    """A normalization keeps its input in float32 (in float32 that is the input itself) and a factor per vector."""
    projection = {"q_norm": "q_proj", "k_norm": "k_proj"}.get(norm.kind)
    width = block.linear(projection).out_features if projection and block.is_known else norm.width
    return FLOAT32 * tokens * (width + width // norm.width)


def _attention(block: Block, shape: ModelShape, batch: Batch) -> tuple[int, int]:
    """Saved by attention between its projections, and needed by its backward beyond what the layer has saved."""
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
        # At the backward of the softmax: gradients of its output and input, of values, and of attention's output.
        return saved + FLOAT32 * scores + copy, 2 * tokens * query * size + 2 * FLOAT32 * scores - copy
    # The kernels keep their output, and a number per row of scores.
    saved += tokens * query * size + FLOAT32 * tokens * shape.heads
    if batch.attention == "sdpa" and batch.padded:
        # torch turns the boolean mask into one to be added, in every layer anew, and keeps it for the backward.
        saved += square * size
    return saved, backward


def kept_int8_inputs(block: Block, batch: Batch) -> int:
    """Inputs of a decoder layer's linear layers without components."""
    bare = [linear for linear in block.linears if not linear.adapted]
    widths = sum(linears[0].in_features for linears in read_together(block, bare))
    return batch.tokens * widths * batch.compute_bytes


def read_together(block: Block, linears: Sequence[Linear]) -> list[list[Linear]]:
    """Some of a decoder layer's linear layers, grouped by the tensor that they read."""
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
    """The components' activations; where the layer makes its components itself, also their rows and columns, and the
    copy that columns are made of."""
    if not linear.adapted:
        return 0
    size = _computing_bytes(batch, adapter)
    own = 0
    if not shape.fused:
        own = (linear.in_features + linear.out_features) * size + linear.out_features * adapter.bytes_per_element
    return linear.rank * (batch.tokens * size + own)


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Parameters of all layers side by side, and components made of them (:mod:`dora_dist.adapter.components`).

    Args:
        parameters: copies of them, in bytes; the equilibrium penalty reads these.
        components: rows and columns that layers multiply with, in bytes, where they are not those copies.
        largest: elements of the largest stack.
    """

    parameters: int
    components: int
    largest: int

    @classmethod
    def of(cls, shape: ModelShape, batch: Batch, adapter: Adapter) -> "SideBySide":
        """Where they are made for all layers at once."""
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
    """Gradients of rows and columns, which wait for those of all layers where components are made for all at once."""
    if not shape.fused:
        return 0
    elements = sum(linear.rank * (linear.in_features + linear.out_features) for linear in linears)
    return elements * _computing_bytes(batch, adapter)


def _input_copies(linear: Linear, batch: Batch, adapter: Adapter) -> int:
    """Bytes per entry of a layer's input that its components make of it for the moment: in their dtype, and dropped."""
    if not linear.adapted:
        return 0
    size = _computing_bytes(batch, adapter)
    return size * ((size != batch.compute_bytes) + adapter.dropout)


def _components_backward(linear: Linear, batch: Batch, adapter: Adapter) -> int:
    """Beside the gradients of output and input: both in the components' dtype, the input dropped again, and what the
    components add to its gradient where they cannot do so in place."""
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
    # Constants of NF4 that are quantized are dequantized first, into float32, and shifted into a copy.
    nested = quantization == "nf4" and not linear.plain_constants
    constants = FLOAT32 * math.ceil(linear.numel / NF4_BLOCK) if nested else 0
    return linear.numel * compute_bytes + constants
