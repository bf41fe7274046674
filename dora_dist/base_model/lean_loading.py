"""Loads the base model with a peak memory close to its final size, and raises if a weight is missing or has the wrong
shape.

transformers (5.23) quantizes one tensor at a time, but what lies around that costs several times the quantized base on
a CPU: see "Loading" in docs/performance.md for what each of the parts here saves. None of them changes a bit.
"""

import ctypes
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_utils

from dora_dist.base_model.quantization import quantization_state

PIECE_NUMEL = 2**17
"""Elements that are quantized at a time on a CPU; a multiple of every block size. Scratch is 13 bytes for each."""
CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMED = 5
"""Tensors that an error names."""


@contextmanager
def lean_loading(device: torch.device, shared: bool) -> Iterator[set[str]]:
    """``from_pretrained`` within this takes the memory of what it returns, and of about one tensor; for a GPU, whose
    memory that is, the time that transformers takes.

    Gives the names of tensors in which a value was found that is not finite, when it has ended.

    Args:
        device: where the weights go.
        shared: weights are used from the file as they are; ranks of a node then share its pages.
    """
    if device.type != "cpu":
        with _files_read(device, mapped=True) as not_finite:
            yield not_finite
        return
    # torch has no types for the constructor.
    with _files_read(device, mapped=shared) as not_finite, QuantizedInPieces():  # type: ignore[no-untyped-call]
        yield not_finite
    return_freed_memory()


@contextmanager
def _files_read(device: torch.device, mapped: bool) -> Iterator[set[str]]:
    """Let transformers read each tensor when it needs it, and look at each on the device that it goes to.

    Without ``mapped``, files are not mapped into memory all at once: their pages count as the process's own until the
    last tensor has been read. safetensors can do either; transformers has no option for it (5.23,
    ``_load_pretrained_model``), and this can go when it has.
    """
    not_finite: set[str] = set()
    looked: list[tuple[str, Tensor]] = []
    opened = getattr(modeling_utils, "safe_open", None)
    if opened is None:  # another transformers: loads the same, in more memory
        yield not_finite
        return

    def open_named(filename: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            file = opened(filename, *args, **(kwargs if mapped else {**kwargs, "backend": "pread"}))
            return _CheckedFile(file, device, looked)
        except SafetensorError as error:
            raise SafetensorError(f"{filename} is damaged: {error}") from None

    with mock.patch.object(modeling_utils, "safe_open", open_named):
        yield not_finite
    if looked:
        names, finite = zip(*looked, strict=True)
        # Read from the device once, when all of it is there.
        not_finite.update(name for name, good in zip(names, torch.stack(finite).tolist(), strict=True) if not good)


class _CheckedFile:
    """A file of safetensors, whose tensors are put on a device and looked at there when they are read.

    Args:
        file: as ``safe_open`` gives it.
        device: of the tensors.
        looked: names are added of tensors with whether all their values are finite, a boolean scalar on the device.
    """

    def __init__(self, file: Any, device: torch.device, looked: list[tuple[str, Tensor]]) -> None:
        self._file = file
        self._device = device
        self._looked = looked

    def __enter__(self) -> "_CheckedFile":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> Any:
        return _CheckedSlice(self._file.get_slice(name), name, self._device, self._looked)


class _CheckedSlice:
    """A tensor of a :class:`_CheckedFile` that is read by indexing."""

    def __init__(self, part: Any, name: str, device: torch.device, looked: list[tuple[str, Tensor]]) -> None:
        self._part = part
        self._name = name
        self._device = device
        self._looked = looked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __getitem__(self, index: Any) -> Tensor:
        read: Tensor = self._part[index].to(self._device)
        if read.dtype in CHECKED and read.numel():
            self._looked.append((self._name, is_finite(read)))
        return read


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all values of a tensor with any are finite: a boolean scalar on its device. Makes no copy."""
    return torch.stack(tensor.aminmax()).isfinite().all()  # the two ends of the values; NaN is both


def return_freed_memory() -> None:
    """glibc keeps what was freed between small blocks that stay; other allocators have no such function."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class QuantizedInPieces(TorchDispatchMode):
    """Quantize a weight on a CPU a piece at a time. bitsandbytes (0.50.2) has no kernel for it there and computes
    with whole copies, of 13 bytes per element beside the weight. Its blocks and rows do not know of each other, so
    that the pieces are the whole."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pieces = None
        if not kwargs and args and isinstance(args[0], Tensor) and args[0].is_cpu:
            if func is torch.ops.bitsandbytes.quantize_4bit.default:
                pieces = args[0].reshape(-1).split(PIECE_NUMEL)
            # A threshold looks for columns of outliers, which are of the whole weight.
            elif func is torch.ops.bitsandbytes.int8_vectorwise_quant.default and len(args) == 1:
                pieces = args[0].split(max(1, PIECE_NUMEL // args[0].shape[-1]))
        if pieces is None or len(pieces) < 2:
            return func(*args, **(kwargs or {}))
        return_freed_memory()  # of the weights before, whose place may be too scattered for this one
        return _apply_in_pieces(func, pieces, args[1:])


def _apply_in_pieces(func: Any, pieces: Sequence[Tensor], args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """``func(piece, *args)`` of every piece, each of its results joined along the first dimension."""
    joined: list[Tensor | None] = []
    ends: list[int] = []
    total = sum(len(piece) for piece in pieces)
    for piece in pieces:
        results = func(piece, *args)
        if not joined:  # made whole at once: what many small results leave behind would be scattered
            sizes = [0 if result is None else math.ceil(total * len(result) / len(piece)) for result in results]
            joined = [
                None if r is None else r.new_empty(size, *r.shape[1:]) for r, size in zip(results, sizes, strict=True)
            ]
            ends = [0] * len(joined)
        for number, (whole, result) in enumerate(zip(joined, results, strict=True)):
            if whole is not None:
                whole[ends[number] : ends[number] + len(result)] = result
                ends[number] += len(result)
    assert all(whole is None or len(whole) == end for whole, end in zip(joined, ends, strict=True))
    return tuple(joined)


def find_mismatches(model: nn.Module, skeleton: nn.Module, loading_info: dict[str, Any]) -> None:
    """Add weights of another shape to ``mismatched_keys``, and replace each by one of its shape, of any values.

    transformers before 5.23 takes weights of any shape where it quantizes some. This can go, together with its call,
    once they are not supported. Quantized weights are left to :func:`check_loaded`.
    """
    found = []
    for name, expected in skeleton.named_parameters():
        parent, _, own_name = name.rpartition(".")
        module = model.get_submodule(parent)
        loaded = getattr(module, own_name)
        if not isinstance(module, Linear4bit | Linear8bitLt) and loaded.shape != expected.shape:
            found.append((name, loaded.shape, expected.shape))
            setattr(module, own_name, nn.Parameter(loaded.new_empty(expected.shape)))
    loading_info["mismatched_keys"] = [*loading_info["mismatched_keys"], *found]


def check_loaded(model: nn.Module, path: str, loading_info: Mapping[str, Any], fresh: Collection[str] = ()) -> None:
    """Refuse a model that is not the one in its files. transformers gives random values to what it does not find or
    cannot use, with a warning, and does not look at the shape of a weight that it quantizes.

    Args:
        model: as loaded.
        path: where from.
        loading_info: what ``from_pretrained`` has found (``output_loading_info``, with ``ignore_mismatched_sizes``).
        fresh: weights that may be missing or have another shape, since they are given values of their own.

    Raises:
        ValueError: weights are missing, have another shape, or belong to a layer that has no place for them.
    """
    missing = sorted(set(loading_info["missing_keys"]) - set(fresh))
    if missing:
        raise ValueError(
            f"the model at model.path {path!r} has no weights for {listed(missing)}: every weight that its "
            "config.json describes must be in its files; copy or download the model again, or give the model that "
            "this config.json belongs to"
        )
    wrong = [
        f"{name} {tuple(is_)} instead of {tuple(should)}"
        for name, is_, should in loading_info["mismatched_keys"]
        if name not in fresh
    ]
    wrong += _wrong_quantized_shapes(model)
    if wrong:
        raise ValueError(
            f"the model at model.path {path!r} holds weights of another shape than its config.json says: "
            f"{listed(sorted(wrong))}; give the config.json that belongs to these files"
        )
    modules = dict(model.named_modules())
    # Not whatever is unexpected: a value head, or the images' part of a larger model, may well be left out.
    homeless = [
        name
        for name in sorted(loading_info["unexpected_keys"])
        if isinstance(getattr(modules.get(name.rpartition(".")[0]), "weight", None), Tensor)
    ]
    if homeless:
        raise ValueError(
            f"the model at model.path {path!r} holds {listed(homeless)}, for which its config.json has no place, so "
            "that they would be left out: give the config.json that belongs to these files (biases, for example, are "
            "switched on there)"
        )


def _wrong_quantized_shapes(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            shape = tuple(quantization_state(module).shape)
        elif isinstance(module, Linear8bitLt):
            shape = tuple(module.weight.shape)
        else:
            continue
        if shape != (module.out_features, module.in_features):
            found.append(f"{name}.weight {shape} instead of {(module.out_features, module.in_features)}")
    return found


def listed(names: list[str]) -> str:
    """Names, the first of them if they are many."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
