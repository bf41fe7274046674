"""Loads the base model with a peak memory close to its final size, and raises if a weight is missing or has the wrong
shape.

transformers (5.23) quantizes one tensor at a time, but on a CPU everything around that takes several times the memory
of the quantized base. "Loading" in docs/performance.md says what each part here saves. None of them changes a bit of
the result.
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
"""Number of elements that are quantized at a time on a CPU; a multiple of every block size. Each takes 13 bytes of
scratch."""
CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMED = 5
"""Most tensors that an error names."""


@contextmanager
def lean_loading(device: torch.device, shared: bool) -> Iterator[set[str]]:
    """Within this context, ``from_pretrained`` on a CPU takes the memory of the model that it returns plus about one
    tensor. On a GPU, only the check for finite values is added.

    Yields a set that, after the context, holds the names of tensors with a value that is not finite.

    Args:
        device: device of the weights.
        shared: whether weights are used unchanged from the mapped file; ranks of a node then share its pages.
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
    """Check every tensor that transformers reads, on the device that it goes to.

    Without ``mapped``, files are read tensor by tensor instead of mapped as a whole: pages of a mapped file count as
    the process's own until the last tensor has been read. safetensors can do either; transformers has no option for it
    (5.23, ``_load_pretrained_model``), and this can go when it has.
    """
    not_finite: set[str] = set()
    looked: list[tuple[str, Tensor]] = []
    opened = getattr(modeling_utils, "safe_open", None)
    if opened is None:  # another version of transformers: loads the same, with more memory
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
        # One read from the device for all tensors.
        not_finite.update(name for name, good in zip(names, torch.stack(finite).tolist(), strict=True) if not good)


class _CheckedFile:
    """A safetensors file whose tensors are moved to a device and checked there when they are read.

    Args:
        file: the file that ``safe_open`` has opened.
        device: device of the tensors.
        looked: list to append to: each tensor's name, and a boolean scalar on the device, True if all values are
            finite.
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
    """Whether all values of a non-empty tensor are finite: a boolean scalar on its device. Makes no copy."""
    return torch.stack(tensor.aminmax()).isfinite().all()  # if there is a NaN, it is both of these


def return_freed_memory() -> None:
    """Return freed memory to the system, which glibc keeps between small blocks in use. Without glibc, does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class QuantizedInPieces(TorchDispatchMode):
    """Within this context, weights on a CPU are quantized piece by piece. bitsandbytes (0.50.2) has no kernel for it
    there and computes on copies of the whole weight, 13 bytes per element. Its blocks and rows are independent of each
    other, so the pieces together are the same result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pieces = None
        if not kwargs and args and isinstance(args[0], Tensor) and args[0].is_cpu:
            if func is torch.ops.bitsandbytes.quantize_4bit.default:
                pieces = args[0].reshape(-1).split(PIECE_NUMEL)
            # With a threshold, it looks for columns of outliers in the whole weight.
            elif func is torch.ops.bitsandbytes.int8_vectorwise_quant.default and len(args) == 1:
                pieces = args[0].split(max(1, PIECE_NUMEL // args[0].shape[-1]))
        if pieces is None or len(pieces) < 2:
            return func(*args, **(kwargs or {}))
        return_freed_memory()  # by earlier weights: it may be too scattered for this one
        return _apply_in_pieces(func, pieces, args[1:])


def _apply_in_pieces(func: Any, pieces: Sequence[Tensor], args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Results of ``func(piece, *args)``, each joined over all pieces along the first dimension."""
    joined: list[Tensor | None] = []
    ends: list[int] = []
    total = sum(len(piece) for piece in pieces)
    for piece in pieces:
        results = func(piece, *args)
        if not joined:  # allocated as a whole: many small results would leave scattered memory behind
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
    """Add weights of a wrong shape to ``mismatched_keys``, and replace each by one of the right shape, with any values.

    Before 5.23, transformers accepts weights of any shape if it quantizes some. This function and its call can go once
    those versions are not supported. :func:`check_loaded` checks quantized weights.
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
    """Refuse a model that is not the one in its files. transformers gives random values to weights that it does not
    find or cannot use, with a warning, and does not check the shape of a weight that it quantizes.

    Args:
        model: the loaded model.
        path: ``model.path``, for the message.
        loading_info: report of ``from_pretrained`` (``output_loading_info``, with ``ignore_mismatched_sizes``).
        fresh: names of weights that may be missing or have another shape, because they start anew.

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
    # Not every unexpected weight is refused: a value head, or the images' part of a larger model, may be left out.
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
    """The first names, and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
