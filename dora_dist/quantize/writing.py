"""Write a base in bitsandbytes' NF4, tensor by tensor: neither the original nor the result is ever in memory as a
whole."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from dora_dist.adapter.card import absolute_base
from dora_dist.base_model import load
from dora_dist.base_model.lean_loading import QuantizedInPieces, check_loaded, is_finite, return_freed_memory
from dora_dist.base_model.quantization import QUANTIZED_FROM, quantization_config
from dora_dist.base_model.shape import read_shape, text_decoder
from dora_dist.console.files import read_json, write_json

SHARD_BYTES = 2 * 10**9
"""Largest size of a file of weights, in bytes, unless one tensor is larger. A whole file is in memory before it is
written."""
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
"""Suffixes of files of weights. All other files of a base are copied, except its card, which is about the 16 bits."""
TEMPLATES = "additional_chat_templates"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What :func:`write_quantized` has written.

    Attributes:
        layers: number of linear layers in 4 bits.
        bytes_before: size of the files that were read.
        bytes_after: size of the tensors that were written.
        files: number of files of weights that were written.
    """

    layers: int
    bytes_before: int
    bytes_after: int
    files: int


def write_quantized(
    spec: load.BaseModelSpec, folder: Path, device: torch.device, note: Callable[[str], None] = lambda _: None
) -> Written:
    """Write a base with its linear layers in NF4 with double quantization, as a run with ``model.quantization: nf4``
    makes them: the same bits. Everything else stays in the dtype that it is stored in.

    Args:
        spec: the base; weights are read in its ``compute_dtype`` before they are quantized.
        folder: the folder to write into, which exists and is empty.
        device: the device on which weights are quantized.
        note: function that is told what is being done.

    Raises:
        ValueError: the base is quantized already, is not a causal language model built like Llama, or its files are not
            the weights that it needs.
    """
    config = load.load_model_config(spec)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{spec.path} is quantized already: runs read it as it is, with model.path: {spec.path}")
    skeleton = load.load_skeleton(spec)
    _check_architecture(spec.path, skeleton)
    source = load.local_folder(spec.path)
    shards = _Shards(folder)
    with _StoredTensors(source, spec.path) as stored:
        names = _check_names(spec.path, skeleton, stored)
        quantize = _Quantizer(skeleton, spec.compute_dtype, device)
        for number, name in enumerate(names):
            note(f"quantizing: tensor {number + 1} of {len(names)}")
            shards.add(quantize(name, stored.read(name)))
        shards.close()
    _copy_others(source, folder)
    # Last: without it, the folder is no model.
    compute_dtype = str(config.dtype or torch.bfloat16).removeprefix("torch.")
    settings = {**quantize.settings.to_dict(), "bnb_4bit_compute_dtype": compute_dtype}
    settings[QUANTIZED_FROM] = absolute_base(load.find_model(spec.path))
    write_json(folder / CONFIG, {**read_json(source / CONFIG), "quantization_config": settings})
    return Written(
        layers=quantize.count, bytes_before=stored.nbytes, bytes_after=shards.nbytes, files=len(shards.files)
    )


def _check_architecture(path: str, skeleton: PreTrainedModel) -> None:
    blocks = read_shape(skeleton, {}).blocks
    if not blocks or text_decoder(skeleton) or not all(block.is_known for block in blocks):
        raise ValueError(
            f"{path} is a {skeleton.config.model_type}, whose decoder layers are not built as Llama's (attention by "
            "four projections, and a gated MLP), and only such are written: give this model to runs as it is, which "
            "quantize it while they read it (model.quantization)"
        )


class _StoredTensors:
    """The tensors in the safetensors files of a model, by name; context in which the files are open.

    Args:
        folder: the model's folder.
        path: the model's path as the user gave it, for messages.

    Attributes:
        nbytes: size of the files.

    Raises:
        ValueError: there are no such files, or a file is damaged or missing.
    """

    def __init__(self, folder: Path, path: str) -> None:
        self._path = path
        whole, index = folder / "model.safetensors", folder / INDEX
        if not whole.is_file() and not index.is_file():
            raise ValueError(f"{path} holds no weights as safetensors (model.safetensors, or {INDEX} and its files)")
        files = (
            [whole] if whole.is_file() else sorted({folder / name for name in read_json(index)["weight_map"].values()})
        )
        self._files: dict[str, Any] = {}
        self._open = ExitStack()
        self.nbytes = 0
        for file in files:
            try:
                # Not mapped into memory: what has been read would count as ours until the end.
                opened = self._open.enter_context(safe_open(file, framework="pt", backend="pread"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}; copy or download the model again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
            self.nbytes += file.stat().st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, for all tensors."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            ValueError: the tensor has a value that is not finite.
        """
        tensor: Tensor = self._files[name].get_tensor(name)
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
            raise ValueError(
                f"{self._path} has values that are not finite (NaN or infinite) in {name}: copy or download the model "
                "again"
            )
        return tensor


def _check_names(path: str, skeleton: PreTrainedModel, stored: _StoredTensors) -> list[str]:
    """Names of the tensors to write, in the order of the model. A weight that is tied to another may be left out."""
    there = stored.shapes()
    places: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    missing = {name for name in expected if name not in there}
    missing -= {name for names in places.values() if not missing.issuperset(names) for name in names}
    found = {
        "missing_keys": missing,
        "unexpected_keys": there.keys() - expected.keys(),
        "mismatched_keys": [
            (name, there[name], shape) for name, shape in expected.items() if there.get(name, shape) != shape
        ],
    }
    check_loaded(skeleton, path, found)
    return [name for name in expected if name in there]


class _Quantizer:
    """Converts a tensor of a model to the tensors that are written for it.

    Args:
        skeleton: the model without weights; gets 4-bit layers.
        dtype: weights are cast to it before they are quantized.
        device: the device on which weights are quantized.

    Attributes:
        settings: transformers' settings of the quantization.
        count: number of layers quantized so far.
    """

    def __init__(self, skeleton: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
        settings = quantization_config("nf4", dtype)
        assert settings is not None
        self.settings = settings
        self.count = 0
        self._skeleton, self._dtype, self._device = skeleton, dtype, device
        self._quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        self._quantizer.preprocess_model(skeleton, dtype=dtype, device_map={"": device})

    def __call__(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """The tensor as it is, or, for the weight of a linear layer, its codes and constants, by transformers' own
        operation.

        Args:
            name: the tensor's name in the model.
            tensor: the tensor, of any dtype, on the CPU.
        """
        if not self._quantizer.param_needs_quantization(self._skeleton, name):
            return {name: tensor}
        self.count += 1
        value = tensor.to(self._device, self._dtype)
        # torch has no types for the constructor.
        with QuantizedInPieces():  # type: ignore[no-untyped-call]
            made = self._quantizer.get_quantize_ops().convert({name: value}, full_layer_name=name, model=self._skeleton)
        weight = made[name]
        state = weight.quant_state.as_dict(packed=True)
        return {name: weight.data.cpu(), **{f"{name}.{part}": constant.cpu() for part, constant in state.items()}}


class _Shards:
    """Files of weights of at most :data:`SHARD_BYTES` in a folder, and their index.

    Attributes:
        files: the files written so far.
        nbytes: size of all tensors so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._places: dict[str, int] = {}
        self.files: list[Path] = []
        self.nbytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors, which stay in one file; the tensors before them are written first if that file would become too
        large."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and size + sum(tensor.nbytes for tensor in self._pending.values()) > SHARD_BYTES:
            self._write()
        self._pending |= tensors
        self.nbytes += size

    def close(self) -> None:
        """Write what is left, give all files their final names, and write their index where there are several."""
        self._write()
        total = len(self.files)
        if total == 1:
            self.files = [self.files[0].rename(self._folder / "model.safetensors")]
            return
        for number, path in enumerate(self.files):
            self.files[number] = path.rename(path.with_stem(f"{path.stem}-of-{total:05}"))
        places = {name: self.files[number].name for name, number in self._places.items()}
        write_json(self._folder / INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": places})

    def _write(self) -> None:
        path = self._folder / f"model-{len(self.files) + 1:05}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._places |= dict.fromkeys(self._pending, len(self.files))
        self.files.append(path)
        self._pending = {}
        return_freed_memory()


def _copy_others(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, licence, and code that comes with the model."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name == TEMPLATES:
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and not _is_left_out(path):
            shutil.copyfile(path, folder / path.name)


def _is_left_out(path: Path) -> bool:
    of_weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
    return of_weights or path.name in (CONFIG, CARD) or path.name.startswith(".")
