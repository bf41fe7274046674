"""Shapes of the measured models, and the number of operations in a step. Plain numbers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with random weights, and the rows it is trained on.

    Args:
        name: the user's name for it.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        layers: number of decoder layers.
        heads: number of query heads.
        key_value_heads: number of key and value heads.
        vocabulary: number of tokens in the vocabulary.
        sequence: number of tokens of a row.
        batch: number of rows of a step.
        checkpointing: settings of gradient checkpointing to measure, unless the user chooses one.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 4096
    sequence: int = 256
    batch: int = 4
    checkpointing: tuple[bool, ...] = (False, True)

    @property
    def tokens(self) -> int:
        """Number of tokens in a step."""
        return self.sequence * self.batch

    def linears(self) -> Iterator[tuple[int, int]]:
        """``(out, in)`` of every linear layer of a decoder layer."""
        narrow = self.hidden // self.heads * self.key_value_heads
        yield from (
            (self.hidden, self.hidden),
            (narrow, self.hidden),
            (narrow, self.hidden),
            (self.hidden, self.hidden),
        )
        yield from ((self.intermediate, self.hidden), (self.intermediate, self.hidden))
        yield self.hidden, self.intermediate

    @property
    def step_flops(self) -> int:
        """Floating point operations in a step of the frozen base: 2 x weights x tokens forward and as many for the
        gradients of the inputs, but none for those of the weights; and attention's two products, causal, once forward
        and twice backward. An adapter's operations and recomputation are not counted."""
        weights = self.layers * sum(out * width for out, width in self.linears()) + self.vocabulary * self.hidden
        attention = self.layers * self.batch * 3 * 2 * 2 * self.hidden * self.sequence**2 // 2
        return 4 * weights * self.tokens + attention


FLOPS_FORMULA = (
    "4 x weights of all linear layers and the head x tokens (forward, gradients of inputs) "
    "+ 6 x layers x batch x hidden x sequence^2 (causal attention); adapters and recomputation not counted"
)


def llama_like(hidden: int, layers: int) -> Shape:
    """A shape as in Llama: heads of 64, an MLP of 8/3 of the width, rounded up to 64."""
    heads = hidden // HEAD_WIDTH
    return Shape(
        name=f"{hidden}x{layers}",
        hidden=hidden,
        intermediate=-(-8 * hidden // (3 * 64)) * 64,
        layers=layers,
        heads=heads,
        key_value_heads=heads,
    )


NAMED = {
    "8b": Shape(
        name="8b",
        hidden=4096,
        intermediate=14336,
        layers=32,
        heads=32,
        key_value_heads=8,
        vocabulary=128256,
        sequence=2048,
        batch=1,
        checkpointing=(True,),
    ),
    # The features that only the 8B shape has, at a size for a CPU.
    "8b-tiny": Shape(
        name="8b-tiny",
        hidden=256,
        intermediate=896,
        layers=2,
        heads=4,
        key_value_heads=1,
        vocabulary=1024,
        sequence=64,
        batch=1,
        checkpointing=(True,),
    ),
}


def parse_shape(name: str) -> Shape:
    """A shape by its name, or by ``WIDTHxLAYERS``.

    Raises:
        ValueError: the text is neither.
    """
    if name in NAMED:
        return NAMED[name]
    match = re.fullmatch(r"(\d+)x(\d+)", name)
    hidden, layers = map(int, match.groups()) if match else (0, 0)
    if not hidden or hidden % HEAD_WIDTH or not layers:
        raise ValueError(
            f"--shapes has {name!r}, but a shape is {', '.join(NAMED)} or WIDTHxLAYERS such as 512x8, the width a "
            f"multiple of {HEAD_WIDTH}, with at least one layer"
        )
    return llama_like(hidden, layers)
