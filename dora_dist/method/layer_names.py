"""What the name of a layer says about its place in the model."""

from typing import NamedTuple


class LayerName(NamedTuple):
    """The parts of a layer's name.

    Attributes:
        stack: name of the stack of blocks, such as ``model.layers``; empty outside of blocks, and where the blocks are
            the model's own numbered parts.
        number: number of the block in its stack; None for a layer outside of all blocks.
        kind: full name within the block, because kinds can share their last part (an encoder's
            ``attention.output.dense`` and ``output.dense``); outside of blocks the layer's full name.
    """

    stack: str
    number: int | None
    kind: str

    @property
    def block(self) -> str:
        """Name of the block, such as ``model.layers.3``; empty outside of all blocks."""
        return "" if self.number is None else f"{self.stack}.{self.number}".lstrip(".")


def split_name(name: str) -> LayerName:
    """Stack, block and kind of a layer. Its block is the first number in the name that something follows:
    ``model.layers.3.self_attn.q_proj`` -> ``("model.layers", 3, "self_attn.q_proj")``. Later numbers, such as those of
    experts or of a block's own layers, belong to the kind."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return LayerName(".".join(parts[:place]), int(part), ".".join(parts[place + 1 :]))
    return LayerName("", None, name)


def without_numbers(name: str) -> str:
    """The name with ``*`` for every number in it, which layers of the same kind share in all blocks."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
