"""Loads a run's adapter, plain LoRA or prompt-routed."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dora_dist.adapter.plain_lora import KEY_PREFIX, read_new_rows
from dora_dist.base_model.new_tokens import fit_rows
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.format_version import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dora_dist.console.phases import Phases
from dora_dist.routing.files import is_routed, read_routed_adapter
from dora_dist.routing.model import RoutedLoraForCausalLM, add_routed_lora
from dora_dist.runs.trained_run import TrainedRun, default_device


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Load the adapter of a run onto its base, for use: frozen, in evaluation mode. A base that has no rows for the
    adapter's new tokens gets them.

    Args:
        base: the model that the adapter was trained on; changed in place.
        folder: folder of the adapter: plain LoRA, which PEFT reads, or a prompt-routed one, which PEFT cannot read.

    Raises:
        ValueError: the folder holds no adapter, one in another format, or one for another base.
    """
    folder = Path(folder)
    if is_routed(folder):
        return _with_routed_adapter(base, folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} holds no adapter: give the folder adapter/ of a run, or one of its checkpoints")
    _check_base(base, _sizes_of(folder), folder)
    new_rows = read_new_rows(folder)
    if new_rows is not None:
        fit_rows(base, new_rows.ids)
    model: PeftModel = PeftModel.from_pretrained(base, str(folder))
    return model.eval()


def load_trained(trained: TrainedRun) -> PeftModel:
    """The base of a run with its adapter, for use on this machine; see :func:`load_adapter`."""
    device = default_device()
    # bfloat16 is far slower than float32 on most CPUs.
    with Phases("loading the model"):
        return load_adapter(trained.load_base(device, in_float32=device.type == "cpu"), trained.adapter)


def _with_routed_adapter(base: PreTrainedModel, folder: Path) -> RoutedLoraForCausalLM:
    saved = read_routed_adapter(folder)
    _check_base(base, {name: (a.shape[1], len(b)) for name, (a, b) in saved.factors.items()}, folder)
    config = DynamicLoraConfig(
        target_rank=saved.rank,
        initial_rank=saved.rank,
        alpha=float(saved.rank),  # the factors are folded: scale 1
        dropout=0.0,
        target_modules=sorted(saved.factors),
        routing="prompt",
        modules_per_prompt=saved.modules_per_prompt,
    )
    model = add_routed_lora(base, config)
    if model.blocks != saved.blocks:
        raise ValueError(f"the adapter in {folder} has its modules in other blocks than this {type(base).__name__}")
    with torch.no_grad():
        for name, layer in model.adapted_layers().items():
            lora_a, lora_b = saved.factors[name]
            layer.lora_a.copy_(lora_a)
            layer.lora_b.copy_(lora_b)
        model.routers.load_state_dict(dict(saved.routers))
    return model.requires_grad_(False).eval()


def _sizes_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Linear layer of plain LoRA -> its inputs and outputs, by the names and shapes of the adapter's tensors.

    PEFT itself passes over tensors for layers that the base does not have.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {ADAPTER_WEIGHTS} beside its {ADAPTER_CONFIG}: copy the whole folder, or save the "
            "adapter as safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}; copy the adapter's folder again") from None
    ending = ".lora_A.weight"
    names = [name.removeprefix(KEY_PREFIX).removesuffix(ending) for name in shapes if name.endswith(ending)]
    found = {name: [shapes.get(f"{KEY_PREFIX}{name}.lora_{part}.weight") for part in "AB"] for name in names}
    return {name: (a[1], b[0]) for name, (a, b) in found.items() if a and b and len(a) == len(b) == 2}


def _check_base(base: PreTrainedModel, layers: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Refuse a base that has no such linear layers; ``layers`` has inputs and outputs by their names."""
    modules = dict(base.named_modules())
    for name, wanted in layers.items():
        if name in modules and not hasattr(modules[name], "in_features"):
            continue  # a Conv1D, say, which names its sizes otherwise
        sizes = tuple(getattr(modules.get(name), size, None) for size in ("in_features", "out_features"))
        if sizes != wanted:
            there = "x".join(map(str, sizes)) if name in modules else "not there"
            raise ValueError(
                f"the adapter in {folder} is for {name} of {wanted[0]}x{wanted[1]}, which is {there} in this "
                f"{type(base).__name__}: give the base that it was trained on"
            )
