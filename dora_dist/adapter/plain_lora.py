"""From gated components to plain LoRA: gates and scale go into B, dropped components go away.

A loader that does not know gates would ignore them silently, so that nothing but folded tensors may ever be
written as an adapter.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_dist.adapter.card import write_card

ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."


@torch.no_grad()
def fold_components(lora_a: Tensor, gate: Tensor, lora_b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain LoRA factors of one layer, at LoRA scale 1 (``r == lora_alpha``).

    Args:
        lora_a: shape ``(r, in)``.
        gate: effective gates, shape ``(r,)``: exactly 0 where a component is pruned.
        lora_b: shape ``(out, r)``.
        scale: ``alpha / initial_rank`` of the run.

    Returns:
        ``(A (k, in), B (out, k))`` in float32 on the CPU, k = number of non-zero gates, with ``B A`` equal to the
        update ``scale * sum_i gate_i b_i a_i``.
    """
    kept = gate != 0
    folded_a = lora_a[kept].float()
    folded_b = lora_b[:, kept].float() * (gate[kept].float() * scale)
    return folded_a.cpu().contiguous(), folded_b.cpu().contiguous()


def pad_rank(factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The same update with ``rank`` components, the added ones zero. Shapes ``(rank, in)``, ``(out, rank)``."""
    lora_a, lora_b = factors
    missing = rank - lora_a.shape[0]
    if missing < 0:
        raise ValueError(f"cannot pad a layer of rank {lora_a.shape[0]} to rank {rank}")
    return (
        torch.nn.functional.pad(lora_a, (0, 0, 0, missing)),
        torch.nn.functional.pad(lora_b, (0, missing)),
    )


def write_lora_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    base_model: str | None,
    task_type: str = "CAUSAL_LM",
    target_modules: Sequence[str] | None = None,
    head: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write plain LoRA factors as an adapter folder that stock PEFT loads exactly, with its model card.

    PEFT needs for that: targets that match just the modules given, a rank of its own for every module with
    ``alpha == rank``, and modules of rank 0 left out. Where all modules have one rank, no patterns are written.

    Args:
        folder: created if missing.
        factors: module name -> ``(A (k, in), B (out, k))`` as of :func:`fold_components`.
        base_model: name or path of the base model, for ``base_model_name_or_path``.
        task_type: PEFT's task type.
        target_modules: what to name as targets instead of the full names of all modules that have a rank.
        head: modules that were trained as a whole, by name, each with its parameters by their names in it.

    Raises:
        ValueError: every module has rank 0, so that there is no adapter to write.
    """
    ranks = {name: lora_a.shape[0] for name, (lora_a, _) in factors.items() if lora_a.shape[0]}
    if not ranks:
        raise ValueError("no component of any layer has a non-zero gate: there is no adapter to write")
    head = head or {}
    config = _lora_config(ranks, base_model, task_type, target_modules, head)
    tensors = _named_tensors({name: factors[name] for name in ranks}, head)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_card(folder, ranks, base_model)


def _lora_config(
    ranks: Mapping[str, int],
    base_model: str | None,
    task_type: str,
    target_modules: Sequence[str] | None,
    head: Collection[str],
) -> LoraConfig:
    widest = max(ranks.values())
    exceptions = {name: rank for name, rank in ranks.items() if rank != widest}
    return LoraConfig(
        r=widest,
        lora_alpha=widest,
        target_modules=sorted(target_modules or ranks),
        modules_to_save=sorted(head) or None,
        rank_pattern=exceptions,
        alpha_pattern=dict(exceptions),
        lora_dropout=0.0,
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def _named_tensors(
    factors: Mapping[str, tuple[Tensor, Tensor]], head: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors by the names under which PEFT saves them."""
    tensors = {}
    for name, (lora_a, lora_b) in sorted(factors.items()):
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = lora_b.contiguous()
    for module, parameters in head.items():
        for name, value in parameters.items():
            tensors[f"{KEY_PREFIX}{module}.{name}"] = value.detach().float().cpu().contiguous()
    return tensors


def read_lora_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain LoRA factors of a folder that :func:`write_lora_adapter` wrote, by module name; a head is left out.

    Returns:
        Module name -> ``(A (k, in), B (out, k))``, where ``B A`` is the whole update. Modules of rank 0 are missing.

    Raises:
        ValueError: the folder holds a LoRA adapter of another kind, whose update is not ``B A``.
    """
    config = LoraConfig.from_pretrained(str(folder))
    if config.r != config.lora_alpha or config.rank_pattern != config.alpha_pattern or config.use_rslora:
        raise ValueError(
            f"the adapter in {folder} has r {config.r} and lora_alpha {config.lora_alpha}: dora_dist writes adapters "
            "with equal ones for every module, so this is not the adapter of a run of it"
        )
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    names = {key.removeprefix(KEY_PREFIX).rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}
    return {
        name: (tensors[f"{KEY_PREFIX}{name}.lora_A.weight"], tensors[f"{KEY_PREFIX}{name}.lora_B.weight"])
        for name in sorted(names)
    }
