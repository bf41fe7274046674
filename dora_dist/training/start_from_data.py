"""The start of an adapter from training rows: ``a_i`` along directions that matter, ``b_i = 0``, ``c_i = 1``.

With ``inputs`` these are the principal directions of what a layer reads, over all tokens x of the rows: eigenvectors of
``sum x x'``. With ``gradient`` they are the right singular vectors of the gradient of the layer's frozen weight,
``sum g x'``, where g is the gradient of the loss by the layer's output. Neither matrix is built: a few probes a layer
go through the rows again and again (:mod:`dora_dist.method.subspaces`). What a pass adds up is linear in the tokens, so
that its sum over the ranks is that of all rows. With ``lora_one`` one more pass gives what the singular vectors have on
the other side, and ``b_i`` is not 0: the adapter is a step down the gradient. Rows go through the model one at a time,
so that there is no padding.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_dist.adapter.layer import DynamicLoraLinear, layer_generator
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.config.adapter import INPUTS, LORA_ONE
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.engine import write_entries
from dora_dist.method.subspaces import EXTRA_PROBES, leading_directions, orthonormal

PASSES = 4
"""Over all rows. Even: the gradient's passes make products with its columns and with its rows in turn."""
GAMMA = 128
"""Divides LoRA-One's step (Zhang, Liu and Chen, 2025)."""
LENGTH = 3**-0.5
"""Root mean square length of the rows a_i as LoRA draws them, which is the scale that learning rates are right for."""


@dataclass(frozen=True, kw_only=True)
class DataStart:
    """How an adapter starts from data.

    Attributes:
        init: ``inputs``, ``gradient`` or ``lora_one``.
        rows: numbers of the training rows that it is made from.
        seed: of the probes, and of what is random in the base.
    """

    init: str
    rows: Sequence[int]
    seed: int

    @property
    def of_gradient(self) -> bool:
        """Whether it is made of gradients, and not of inputs alone."""
        return self.init != INPUTS


def spread(count: int, num_rows: int) -> tuple[int, ...]:
    """Numbers of ``count`` rows, or of all where there are fewer, spread over the data: rows that follow each other may
    have been sorted."""
    count = min(count, num_rows)
    return tuple(number * num_rows // count for number in range(count))


def start_from_data(
    model: DynamicLoraModel, loss_of_row: Callable[[int], Tensor], start: DataStart, agreement: Agreement
) -> None:
    """Turn the rows ``a_i`` of every layer to directions from data, and with ``lora_one`` give ``b_i`` values too, on
    every rank to the same bits.

    Args:
        model: with its adapter at LoRA's start, so that it computes what its base computes.
        loss_of_row: the task loss of a training row by its number, a sum over its targets; a scalar.
        start: which directions, from which rows.
        agreement: over the ranks, which share the rows.

    Raises:
        ValueError: no row has reached a layer, or what has is not finite; on all ranks.
        RankFailedError: a rank has failed; on all ranks.
    """
    layers = model.adapted_layers()
    rows = _Rows(model, loss_of_row, start)
    with _as_in_training(model):
        if start.of_gradient:
            groups = {name: [name] for name in layers}
        else:
            with agreement.together("looking which layers read one tensor"):
                groups = _read_together(layers, rows)
        probes = _draw_probes(layers, groups, start)
        for number in range(1, PASSES + 1):
            probes = _next_probes(number, layers, probes, rows, agreement)
        images = _images(layers, probes, rows, agreement) if start.init == LORA_ONE else None
    with torch.no_grad():
        for leader, names in groups.items():
            for layer in map(layers.__getitem__, names):
                rank, whole = len(layer.lora_a), torch.ones_like(layer.lora_a, dtype=torch.bool)
                rows_a = probes.parts[leader][:, :rank].T * (LENGTH if images is None else 1)
                write_entries(layer.lora_a, rows_a, whole)
                if images is not None:
                    columns = images.parts[leader][:, :rank]
                    write_entries(layer.lora_b, columns, torch.ones_like(layer.lora_b, dtype=torch.bool))
    moved = ", one step down their gradient and not the base" if images is not None else ""
    say(f"the adapter starts from {len(start.rows)} training rows{moved} (adapter.init {start.init})")


class _Columns:
    """Columns for each of several layers, shape ``(width, number)``: views of one flat tensor."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], like: Tensor) -> None:
        sizes = [width * number for width, number in shapes.values()]
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
        parts = zip(self.flat.split(sizes), shapes.items(), strict=True)
        self.parts = {name: part.view(shape) for part, (name, shape) in parts}


@dataclass(frozen=True)
class _Rows:
    """Training rows that go through the model."""

    model: DynamicLoraModel
    loss_of_row: Callable[[int], Tensor]
    start: DataStart

    def run(self, numbers: Sequence[int]) -> None:
        """Forward, and with ``gradient`` backward, of these rows one by one. What is random in the base depends on the
        row only, and no other random state moves."""
        device = self.model.device
        backward = self.start.of_gradient
        for number in numbers:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.set_grad_enabled(backward):
                torch.manual_seed(self.start.seed + number)
                loss = self.loss_of_row(number)
                if backward:
                    loss.backward()


def _draw_probes(
    layers: Mapping[str, DynamicLoraLinear], groups: Mapping[str, Sequence[str]], start: DataStart
) -> _Columns:
    """Random ones for the first layer of each group, shape ``(in, probes)``."""
    shapes = {}
    for name, group in groups.items():
        layer = layers[name]
        width, outputs = layer.lora_a.shape[1], len(layer.lora_b)
        most = min(width, outputs) if start.of_gradient else width
        wanted = max(len(layers[one].lora_a) for one in group)
        shapes[name] = width, min(wanted + EXTRA_PROBES, most)
    probes = _Columns(shapes, next(iter(layers.values())).lora_a)
    for name, part in probes.parts.items():
        part.copy_(orthonormal(torch.randn(part.shape, generator=layer_generator(start.seed, name))))
    return probes


def _next_probes(
    number: int, layers: Mapping[str, DynamicLoraLinear], probes: _Columns, rows: _Rows, agreement: Agreement
) -> _Columns:
    """What a pass makes of the probes: orthonormal, the same bits on every rank. After the last pass, the columns are
    the directions, the largest first."""
    sums = _pass(number, layers, probes, rows, agreement)
    with agreement.together(f"end of pass {number}"):
        _check_reached(sums, rows.start)
        if agreement.is_first:  # kinds of processors differ in the last bits of a decomposition
            for part in sums.parts.values():
                last = number == PASSES
                part.copy_(leading_directions(part, part.shape[1]).T if last else orthonormal(part))
    agreement.take_first(sums.flat)
    return sums


def _images(layers: Mapping[str, DynamicLoraLinear], probes: _Columns, rows: _Rows, agreement: Agreement) -> _Columns:
    """LoRA-One's start from the right singular vectors of each layer's gradient G. With ``-G = U S V'``, S divided by
    its first entry: columns ``b_k = u_k sqrt(S_k / gamma)``, shape ``(out, probes)``; the probes become
    ``a_k = v_k sqrt(S_k / gamma)``."""
    images = _pass(PASSES + 1, layers, probes, rows, agreement)
    with agreement.together("LoRA-One's start"):
        _check_reached(images, rows.start)
        if agreement.is_first:
            for name, image in images.parts.items():
                left, values, right = torch.linalg.svd(image.double(), full_matrices=False)
                lengths = (values / (values[0] * GAMMA)).sqrt()
                image.copy_(-left * lengths)
                probes.parts[name].copy_(probes.parts[name].double() @ right.T * lengths)
    agreement.take_first(images.flat)
    agreement.take_first(probes.flat)
    return images


def _pass(
    number: int, layers: Mapping[str, DynamicLoraLinear], probes: _Columns, rows: _Rows, agreement: Agreement
) -> _Columns:
    """Products of each layer's matrix over all rows with its probes, the sum over the ranks."""
    start, in_all = rows.start, PASSES + (rows.start.init == LORA_ONE)
    to_outputs = start.of_gradient and number % 2 == 1
    shapes = {
        name: (len(layers[name].lora_b) if to_outputs else layers[name].lora_a.shape[1], part.shape[1])
        for name, part in probes.parts.items()
    }
    sums = _Columns(shapes, probes.flat)
    phase = f"pass {number} of {in_all} over {len(start.rows)} rows for adapter.init"
    with agreement.together(phase), _observed(layers, probes, sums, start.of_gradient, to_outputs):
        rows.run(start.rows[agreement.rank :: agreement.size])
    agreement.add_up(sums.flat)
    return sums


def _check_reached(sums: _Columns, start: DataStart) -> None:
    what = "a gradient" if start.of_gradient else "an input"
    for name, part in sums.parts.items():
        if not torch.isfinite(part).all():
            raise ValueError(
                f"adapter.init is {start.init}, but {name} has {what} that is not finite, in "
                f"{len(start.rows)} training rows: set adapter.init to lora, or find out what the base makes of them"
            )
        if not part.any():
            raise ValueError(
                f"adapter.init is {start.init}, but none of {len(start.rows)} training rows has given {name} "
                f"{what} other than 0: raise adapter.calibration_rows, leave the layer out of adapter.target_modules, "
                "or set adapter.init to lora"
            )


@contextmanager
def _observed(
    layers: Mapping[str, DynamicLoraLinear], probes: _Columns, sums: _Columns, of_gradient: bool, to_outputs: bool
) -> Iterator[None]:
    """While it lasts, add up the products of each layer's matrix, over all tokens that come to it, with its probes."""
    handles = []
    for name, total in sums.parts.items():
        add = _adder(probes.parts[name], total, to_outputs)
        if of_gradient:
            handles.append(layers[name].register_forward_hook(_tap(add)))
        else:
            handles.append(layers[name].register_forward_pre_hook(_reader(add)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Add = Callable[[Tensor, Tensor], None]
"""Adds up what the tokens of two tensors say, of shapes ``(..., in)`` and ``(..., in or out)``: the input of a layer,
and what the sum's other vectors are, the same input or the gradient of its output."""


def _adder(probes: Tensor, total: Tensor, to_outputs: bool) -> Add:
    """``total += sum other (x' probes)`` with ``to_outputs``, and ``total += sum x (other' probes)`` otherwise."""

    @torch.no_grad()
    def add(x: Tensor, other: Tensor) -> None:
        projected, spread = (x, other) if to_outputs else (other, x)
        hidden = _tokens(projected, total.dtype) @ probes
        total.addmm_(_tokens(spread, total.dtype).T, hidden)

    return add


def _tokens(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)


def _reader(add: Add) -> Callable[..., None]:
    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        add(inputs[0], inputs[0])

    return read


def _tap(add: Add) -> Callable[..., Tensor]:
    anchor = torch.zeros((), requires_grad=True)  # nothing below the first layer needs a gradient

    def tap(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(output, inputs[0], anchor, add)  # type: ignore[no-untyped-call]
        return tapped

    return tap


class _Tap(torch.autograd.Function):
    """A layer's output as it is. In the backward its gradient and the layer's input are looked at together; the input
    is one that gradient checkpointing computes again, as any that a layer keeps."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.clone()  # a view could not be changed in place, which some models do

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.add(x, gradient)
        return gradient, None, None, None


def _read_together(layers: Mapping[str, DynamicLoraLinear], rows: _Rows) -> dict[str, list[str]]:
    """First layer -> all layers that read the same tensor, found out by the first row. A layer that this row does not
    come to is alone."""
    leaders: dict[str, str] = {}
    seen: list[tuple[str, weakref.ref[Tensor], int]] = []

    def looking(name: str) -> Callable[..., None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            same = (leader for leader, tensor, version in seen if tensor() is x and version == x._version)
            leader = next(same, name)
            seen.append((leader, weakref.ref(x), x._version))
            leaders.setdefault(name, leader)

        return look

    handles = [layer.register_forward_pre_hook(looking(name)) for name, layer in layers.items()]
    try:
        rows.run(rows.start.rows[:1])
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(leaders.get(name, name), []).append(name)
    return groups


@contextmanager
def _as_in_training(model: DynamicLoraModel) -> Iterator[None]:
    """Compute as in training, but let no parameter have a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.train()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
