"""Passes over training rows before the first step; hooks on the layers accumulate statistics of inputs and gradients.

The statistics are linear in the tokens, so their sum over the ranks is the sum over all rows. Rows are run one at a
time, without padding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_dist.adapter.layer import DynamicLoraLinear, layer_generator
from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.distributed.agreement import Agreement
from dora_dist.method.subspaces import EXTRA_PROBES, leading_directions, orthonormal

PASSES = 4
"""Passes over all rows that find directions. Even, because with gradients the passes alternate between products with
the matrix and with its transpose."""


class Calibration(Protocol):
    """A quantity that is computed from training rows.

    Attributes:
        setting: configuration key and value that ask for it, for messages.
        instead: another value for that key, suggested where the quantity cannot be computed.
        of_gradient: whether it needs gradients, or inputs alone.
        num_passes: number of passes over the rows.
        rows: indices of the training rows.
        seed: seed of the probes and of randomness in the base.
    """

    @property
    def setting(self) -> str: ...

    @property
    def instead(self) -> str: ...

    @property
    def of_gradient(self) -> bool: ...

    @property
    def num_passes(self) -> int: ...

    @property
    def rows(self) -> Sequence[int]: ...

    @property
    def seed(self) -> int: ...


Add = Callable[[Tensor, Tensor], None]
"""Accumulates a statistic of two tensors, shapes ``(..., in)`` and ``(..., in or out)``: a layer's input, and either
the same input or the gradient of the layer's output."""


class Columns:
    """A matrix of shape ``(width, number)`` for each of several layers; all are views of one flat tensor."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], like: Tensor) -> None:
        sizes = [width * number for width, number in shapes.values()]
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
        parts = zip(self.flat.split(sizes), shapes.items(), strict=True)
        self.parts = {name: part.view(shape) for part, (name, shape) in parts}


@dataclass(frozen=True)
class Rows:
    """Runs training rows through the model."""

    model: DynamicLoraModel
    loss_of_row: Callable[[int], Tensor]
    calibration: Calibration

    def run(self, numbers: Sequence[int]) -> None:
        """Run these rows one by one: forward, and backward if the calibration needs gradients. Randomness in the base
        depends on the row only, and no other random state changes."""
        device = self.model.device
        backward = self.calibration.of_gradient
        for number in numbers:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.set_grad_enabled(backward):
                torch.manual_seed(self.calibration.seed + number)
                loss = self.loss_of_row(number)
                if backward:
                    loss.backward()


def draw_probes(
    layers: Mapping[str, DynamicLoraLinear], groups: Mapping[str, Sequence[str]], calibration: Calibration
) -> Columns:
    """Random orthonormal probes for the first layer of each group, shape ``(in, probes)``."""
    shapes = {}
    for name, group in groups.items():
        layer = layers[name]
        width, outputs = layer.lora_a.shape[1], len(layer.lora_b)
        most = min(width, outputs) if calibration.of_gradient else width
        wanted = max(len(layers[one].lora_a) for one in group)
        shapes[name] = width, min(wanted + EXTRA_PROBES, most)
    probes = Columns(shapes, next(iter(layers.values())).lora_a)
    for name, part in probes.parts.items():
        part.copy_(orthonormal(torch.randn(part.shape, generator=layer_generator(calibration.seed, name))))
    return probes


def next_probes(
    number: int, layers: Mapping[str, DynamicLoraLinear], probes: Columns, rows: Rows, agreement: Agreement
) -> Columns:
    """The probes after one more pass: orthonormal, with the same bits on every rank. After the last pass, their columns
    are the directions, the largest first."""
    sums = products_of(number, layers, probes, rows, agreement)
    with agreement.together(f"the directions of pass {number}"):
        if agreement.is_first:  # the last bits of a decomposition depend on the processor
            for part in sums.parts.values():
                last = number == PASSES
                part.copy_(leading_directions(part, part.shape[1]).T if last else orthonormal(part))
    agreement.take_first(sums.flat)
    return sums


def products_of(
    number: int, layers: Mapping[str, DynamicLoraLinear], probes: Columns, rows: Rows, agreement: Agreement
) -> Columns:
    """Products of each layer's matrix with its probes from one pass over all rows, summed over the ranks."""
    to_outputs = rows.calibration.of_gradient and number % 2 == 1
    shapes = {
        name: (len(layers[name].lora_b) if to_outputs else layers[name].lora_a.shape[1], part.shape[1])
        for name, part in probes.parts.items()
    }
    sums = Columns(shapes, probes.flat)
    adders = {name: _adder(probes.parts[name], total, to_outputs) for name, total in sums.parts.items()}
    add_up_rows(number, layers, adders, sums, rows, agreement)
    return sums


def add_up_rows(
    number: int,
    layers: Mapping[str, DynamicLoraLinear],
    adders: Mapping[str, Add],
    sums: Columns,
    rows: Rows,
    agreement: Agreement,
) -> None:
    """Make one pass over all rows, which the ranks share.

    Args:
        number: number of the pass, counted from 1.
        layers: adapted layers by name.
        adders: observed layer -> function that adds the layer's statistic to ``sums``.
        sums: sums of the statistics; filled with those over all ranks.
        rows: rows to run through the model.
        agreement: collectives over the ranks.

    Raises:
        ValueError: a layer's statistic is 0 because no row reached it, or is not finite; on all ranks.
        RankFailedError: a rank has failed; on all ranks.
    """
    made_of = rows.calibration
    phase = f"pass {number} of {made_of.num_passes} over {len(made_of.rows)} rows ({made_of.setting})"
    with agreement.together(phase, runs_model=True):
        with _observed(layers, adders, made_of.of_gradient):
            rows.run(made_of.rows[agreement.rank :: agreement.size])
        with _observed(layers, dict.fromkeys(adders, _add_nothing), made_of.of_gradient):
            rows.run(made_of.rows[: agreement.runs_more(len(made_of.rows))])
    agreement.add_up(sums.flat)
    with agreement.together(f"end of pass {number}"):
        _check_reached(sums, made_of)


def _add_nothing(x: Tensor, other: Tensor) -> None:
    """The adder for rows that a rank runs only because other ranks have more rows."""


def _check_reached(sums: Columns, calibration: Calibration) -> None:
    what = "a gradient" if calibration.of_gradient else "an input"
    for name, part in sums.parts.items():
        if not torch.isfinite(part).all():
            raise ValueError(
                f"{calibration.setting}, but {name} has {what} that is not finite, in {len(calibration.rows)} training "
                f"rows: set {calibration.instead}, or check these rows and the base's output on them"
            )
        if not part.any():
            raise ValueError(
                f"{calibration.setting}, but none of {len(calibration.rows)} training rows has given {name} "
                f"{what} other than 0: raise adapter.calibration_rows, remove the layer from adapter.target_modules, "
                f"or set {calibration.instead}"
            )


@contextmanager
def _observed(layers: Mapping[str, DynamicLoraLinear], adders: Mapping[str, Add], of_gradient: bool) -> Iterator[None]:
    """Calls the adders with the observed layers' tensors inside the block."""
    handles = []
    for name, add in adders.items():
        if of_gradient:
            handles.append(layers[name].register_forward_hook(_tap(add)))
        else:
            handles.append(layers[name].register_forward_pre_hook(_reader(add)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(probes: Tensor, total: Tensor, to_outputs: bool) -> Add:
    """``total += sum other (x' probes)`` with ``to_outputs``, otherwise ``total += sum x (other' probes)``."""

    @torch.no_grad()
    def add(x: Tensor, other: Tensor) -> None:
        projected, spread = (x, other) if to_outputs else (other, x)
        hidden = tokens_of(projected, total.dtype) @ probes
        total.addmm_(tokens_of(spread, total.dtype).T, hidden)

    return add


def tokens_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)


def _reader(add: Add) -> Callable[..., None]:
    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        add(inputs[0], inputs[0])

    return read


def _tap(add: Add) -> Callable[..., Tensor]:
    anchor = torch.zeros((), requires_grad=True)  # makes autograd run where nothing below needs a gradient

    def tap(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(output, inputs[0], anchor, add)  # type: ignore[no-untyped-call]
        return tapped

    return tap


class _Tap(torch.autograd.Function):
    """Returns a layer's output unchanged. The backward passes the layer's input and the output's gradient to the adder.
    The input is a saved tensor, so gradient checkpointing recomputes it like any other."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.clone()  # some models change the output in place, which a view would not allow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.add(x, gradient)
        return gradient, None, None, None


@contextmanager
def as_in_training(model: DynamicLoraModel) -> Iterator[None]:
    """Computes as in training, without gradients for parameters."""
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
