"""The operands that adapted layers multiply with, made from the parameters of all layers at once.

A layer reads its rows ``a_i`` and its columns ``s c_i b_i``, in the dtype of the computation and with masked components
at 0. Made layer by layer, they take several small operations per layer, in every forward and in every recomputation,
and on a GPU a step of one row waits for the launches of these. Here the parameters of all layers are copied side by
side once per forward, and a few operations make what all layers read. Parameters stay where they are, since ZeRO owns
their storage.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

REENTRANT = (
    "a layer is computed again in the backward by the reentrant kind of gradient checkpointing, in which no gradient "
    "comes to its components: call gradient_checkpointing_enable({'use_reentrant': False})"
)


class AdaptedLayer(Protocol):
    """The part of :class:`~dora_dist.adapter.layer.DynamicLoraLinear` that is read here."""

    component_mask: Tensor

    @property
    def lora_a(self) -> nn.Parameter: ...
    @property
    def gate(self) -> nn.Parameter: ...
    @property
    def lora_b(self) -> nn.Parameter: ...
    @property
    def scale(self) -> float: ...


class Stacks(NamedTuple):
    """Parameters of layers side by side: copies, differentiable with respect to the parameters."""

    rows: tuple[Tensor, ...]
    """For each input width, rows ``a_i`` of all layers that have it, shape ``(components, in)``."""
    gates: Tensor
    """Gates ``c_i``, shape ``(components,)``, in the order of :attr:`columns`."""
    columns: tuple[Tensor, ...]
    """For each shape of ``lora_b``, those of all layers that have it, shape ``(layers, out, r)``."""


class Operands(NamedTuple):
    """Operands of layers that read one tensor, in the dtype of the computation."""

    rows: Tensor
    """``a_i`` of all these layers, shape ``(components, in)``."""
    columns: tuple[Tensor, ...]
    """``s c_i b_i`` of each layer, shape ``(r, out)``; exactly 0 where a component is masked."""


class Layout:
    """The order in which parameters of layers lie side by side.

    Args:
        groups: groups of layers; the layers of a group read one tensor.
    """

    def __init__(self, groups: Sequence[Sequence[AdaptedLayer]]) -> None:
        self.groups = groups
        self._by_width: dict[int, list[int]] = {}
        self._by_shape: dict[torch.Size, list[AdaptedLayer]] = {}
        for number, group in enumerate(groups):
            self._by_width.setdefault(group[0].lora_a.shape[1], []).append(number)
            for layer in group:
                self._by_shape.setdefault(layer.lora_b.shape, []).append(layer)
        self._layers = [layer for layers in self._by_shape.values() for layer in layers]
        # Components of each group of a width, and of the layers of each shape: fixed, as shapes never change.
        self._sizes_of_rows = [
            [sum(len(layer.gate) for layer in groups[number]) for number in numbers]
            for numbers in self._by_width.values()
        ]
        self._sizes_of_gates = [len(layers) * shape[1] for shape, layers in self._by_shape.items()]
        self._masks: list[Tensor] = []
        self._state: list[tuple[int, int, float]] = []
        self._factors: Factors

    @property
    def component_dtype(self) -> torch.dtype:
        """Dtype in which components are computed: the adapter's, or autocast's where that is on."""
        kind = self._layers[0].gate.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._layers[0].lora_a.dtype

    def stack(self) -> Stacks:
        """The parameters as they are now."""
        columns = tuple(torch.stack([layer.lora_b for layer in layers]) for layers in self._by_shape.values())
        rows = tuple(
            torch.cat([layer.lora_a for number in numbers for layer in self.groups[number]])
            for numbers in self._by_width.values()
        )
        return Stacks(rows, torch.cat([layer.gate for layer in self._layers]), columns)

    def operands(self, stacks: Stacks) -> list[Operands]:
        """Operands of every group, made from stacked parameters."""
        dtype, constants = self.component_dtype, self._current_factors()
        rows: dict[int, Tensor] = {}
        widths = zip(self._by_width.values(), self._sizes_of_rows, stacks.rows, constants.masks, strict=True)
        for numbers, sizes, stack, mask in widths:
            kept = stack if mask is None else stack * mask
            rows |= zip(numbers, kept.to(dtype).split(sizes), strict=True)
        scaled = (stacks.gates * constants.scales).to(stacks.gates.dtype)
        factors = scaled.split(self._sizes_of_gates)
        columns: dict[AdaptedLayer, Tensor] = {}
        for (shape, layers), stack, factor in zip(self._by_shape.items(), stacks.columns, factors, strict=True):
            # torch has no types for `apply`.
            made: Tensor = _Columns.apply(stack, factor, dtype)  # type: ignore[no-untyped-call]
            columns |= zip(layers, made.split(shape[1]), strict=True)
        return [
            Operands(rows[number], tuple(columns[layer] for layer in group)) for number, group in enumerate(self.groups)
        ]

    @torch.inference_mode(False)  # autograd would refuse constants made in that mode, in the forwards after it
    def _current_factors(self) -> "Factors":
        """The factors, made anew only after a mask or a scale has changed: reading a mask makes the host wait."""
        state = [(id(layer.component_mask), layer.component_mask._version, layer.scale) for layer in self._layers]
        if state != self._state:
            self._state = state
            self._masks = [layer.component_mask for layer in self._layers]  # kept alive: no other gets their ids
            gate = self._layers[0].gate
            wide = torch.promote_types(gate.dtype, torch.float32)
            scales = [mask.to(wide) * layer.scale for mask, layer in zip(self._masks, self._layers, strict=True)]
            masks: list[Tensor | None] = [None] * len(self._by_width)
            if not torch.cat(self._masks).all():
                for at, numbers in enumerate(self._by_width.values()):
                    of_width = [layer.component_mask for number in numbers for layer in self.groups[number]]
                    masks[at] = torch.cat(of_width).to(gate.dtype).unsqueeze(1)
            self._factors = Factors(torch.cat(scales), masks)
        return self._factors


class _Columns(torch.autograd.Function):
    """``s c_i b_i`` of layers of one shape, shape ``(components, out)``, from their ``lora_b``, shape
    ``(layers, out, r)``, and their ``s c_i``, shape ``(components,)``.

    Left to autograd, a transposed copy of all ``lora_b`` would be kept for the backward, and another one made there.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        layers, width, rank = stack.shape
        ctx.save_for_backward(stack, factor)
        made = stack.new_empty((layers, rank, width), dtype=dtype)
        torch.mul(stack.mT, factor.view(layers, rank, 1), out=made)
        return made.view(-1, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        stack, factor = ctx.saved_tensors
        layers, width, rank = stack.shape
        grad = grad_output.view(layers, rank, width)
        needs_stack, needs_factor, _ = ctx.needs_input_grad
        grad_factor = (grad * stack.mT).sum(-1).view(-1).to(factor.dtype) if needs_factor else None
        if not needs_stack:
            return None, grad_factor, None
        # In the parameters' memory order: otherwise autograd would copy every layer's part on its own.
        grad_stack = torch.mul(grad.mT, factor.view(layers, 1, rank), out=torch.empty_like(stack))
        return grad_stack, grad_factor, None


class Factors(NamedTuple):
    """Factors of the components other than their gates. They are constant between two events."""

    scales: Tensor
    """``s``, 0 for a masked component, shape ``(components,)``, in the order of the gates, in at least float32."""
    masks: Sequence[Tensor | None]
    """Masks of the rows of each input width, shape ``(components, 1)``; None where no component is masked. They make a
    masked component 0 however large it is: its row times 0 stays finite, but products of its row may not."""


class GatheredOperands:
    """Operands of all adapted layers of a model, made once in each of its forwards.

    Non-reentrant gradient checkpointing computes layers again in the backward. There they find the operands that the
    forward has made, since no operands are made within a layer. Reentrant checkpointing, whose layers would get no
    gradient, is refused in the backward. ``torch.compile`` leaves all of this as it is: it cannot trace hooks that
    outlast the forward.

    Args:
        groups: groups of layers that read one tensor; every adapted layer of the model is in one group.
    """

    def __init__(self, groups: Sequence[Sequence[AdaptedLayer]]) -> None:
        self._layout = Layout(groups)
        self._place = {layer: (number, at) for number, group in enumerate(groups) for at, layer in enumerate(group)}
        self._running: nn.Module | None = None
        self._trained = False
        self._without_gradients: set[int] = set()
        self._stacks: Stacks | None = None
        self._operands: list[Operands] | None = None
        self._forward = 0
        self._of_backward = -1

    def __getstate__(self) -> dict[str, Any]:
        """The attributes without those of one forward: a tensor with a history cannot be copied."""
        return {**vars(self), "_running": None, "_stacks": None, "_operands": None}

    def attach(self, model: nn.Module) -> None:
        """Serve the layers in the forwards of this model and of models within it, such as its decoder without the
        head, and in their backwards."""
        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end, always_call=True)

    def stacks(self) -> Stacks:
        """Parameters of all layers: the copies that the latest forward has read, until its backward; then new copies.

        A loss of them can share that forward's backward, which costs less than going through the parameters.
        """
        return self._layout.stack() if self._stacks is None else self._stacks

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
    def of(self, layers: Sequence[AdaptedLayer]) -> Operands | None:
        """Operands of layers that follow each other in one group, within a forward of the model and its backward; None
        elsewhere.

        Raises:
            ValueError: gradient checkpointing is reentrant.
        """
        number, at = self._place[layers[0]]
        if self._running is not None:
            if self._trained and not torch.is_grad_enabled():
                self._without_gradients.add(number)
        elif not self._in_backward():
            return None
        elif number in self._without_gradients and torch.is_grad_enabled():
            raise ValueError(REENTRANT)
        assert self._operands is not None
        whole, group = self._operands[number], self._layout.groups[number]
        if len(layers) == len(group):
            return whole
        sizes = [len(layer.gate) for layer in group]
        start, end = sum(sizes[:at]), sum(sizes[: at + len(layers)])
        return Operands(whole.rows[start:end], whole.columns[at : at + len(layers)])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
    def _begin(self, module: nn.Module, _: Any) -> None:
        if self._running is not None:
            return
        self._running = module
        self._stacks = self._layout.stack()
        self._operands = self._layout.operands(self._stacks)
        trained = _first_with_a_gradient(self._stacks)
        self._forward += 1
        self._trained = trained is not None
        if trained is not None:
            self._without_gradients = set()
            trained.register_hook(partial(_forget, weakref.ref(self), self._forward))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
    def _end(self, module: nn.Module, *_: Any) -> None:
        if module is not self._running:
            return
        self._running = None
        if not self._trained:
            self.forget(self._forward)

    def forget(self, forward: int) -> None:
        """Let go of what the forward with this number has made, unless a later forward has replaced it."""
        if self._forward == forward:
            self._stacks = self._operands = None

    def _in_backward(self) -> bool:
        """Whether a backward is running. Operands are then there: those of the latest forward or, if its backward has
        already run, the same values made again. No gradient goes through values made again."""
        backward = torch._C._current_graph_task_id()  # torch has no public name; its checkpointing asks for it too
        if backward < 0:
            return False
        if self._stacks is None and (self._operands is None or self._of_backward != backward):
            with torch.no_grad():
                self._operands = self._layout.operands(self._layout.stack())
            self._of_backward = backward
        return True


def operands_of(layers: Sequence[AdaptedLayer], gathered: GatheredOperands | None) -> Operands:
    """Operands of layers that read one tensor: gathered ones while the whole model runs, their own otherwise."""
    found = None if gathered is None else gathered.of(layers)
    if found is None:
        layout = Layout([layers])
        (found,) = layout.operands(layout.stack())
    return found


def stacks_of(layers: Sequence[AdaptedLayer], gathered: GatheredOperands | None) -> Stacks:
    """Parameters of all adapted layers of a model; see :meth:`GatheredOperands.stacks`."""
    return Layout([[layer] for layer in layers]).stack() if gathered is None else gathered.stacks()


def _forget(gathered: "weakref.ref[GatheredOperands]", forward: int, _: Tensor) -> None:
    """A tensor hook, which may hold neither its tensor nor anything that does: Python finds no cycle through an
    autograd graph, so every forward would leave its tensors behind."""
    alive = gathered()
    if alive is not None:
        alive.forget(forward)


def _first_with_a_gradient(stacks: Stacks) -> Tensor | None:
    """The stack that a backward reaches first after it has left all layers: the last one made that is trained."""
    made = (*stacks.columns, *stacks.rows, stacks.gates)
    return next((stack for stack in reversed(made) if stack.requires_grad), None)
