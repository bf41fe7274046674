"""Folds gated components into plain LoRA, and reads plain LoRA that this program or PEFT has written.

Gates and scale are folded into B; pruned components are left out. A loader that does not know gates would ignore them
silently, so nothing but folded tensors may ever be written as an adapter.

An adapter for users has one rank for all modules, padded with zeros: vLLM ignores ``rank_pattern``, and llama.cpp
divides one ``lora_alpha`` by the rank of each tensor and ignores ``alpha_pattern``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_dist.adapter.card import absolute_base, write_card
from dora_dist.config.format_version import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dora_dist.console.files import read_json

KEY_PREFIX = "base_model.model."
Factors = tuple[Tensor, Tensor]
"""Factors of a layer: ``A (k, in)`` and ``B (out, k)``, whose product ``B A`` is the update."""

NEW_ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name, within a module, for those of its rows that are trained."""
HEAD, TOKEN_ROWS = "modules_to_save", "trainable_token_indices"
"""Entries of PEFT's configuration: modules that were trained as a whole, and single rows of tokens."""
BESIDE_THE_UPDATE = (
    *("use_dora", HEAD, "lora_bias", TOKEN_ROWS, "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Entries of PEFT's configuration under which an adapter computes more than ``s B A x``."""
KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of PEFT's ``init_lora_weights`` that leave the base unchanged; others (PiSSA, OLoRA) subtract the start."""


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows of new tokens, which replace the base's.

    Attributes:
        ids: ids of the tokens.
        rows: name of the embedding or output head -> its rows, shape ``(tokens, hidden)``.
    """

    ids: Sequence[int]
    rows: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FoundLora:
    """Plain LoRA of one layer, whose update is ``scale * B A``.

    Attributes:
        lora_a: ``A``, shape ``(k, in)``, float32.
        lora_b: ``B``, shape ``(out, k)``, float32.
        scale: the scale that PEFT derives from alpha and rank.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float


@torch.no_grad()
def fold_components(lora_a: Tensor, gate: Tensor, lora_b: Tensor, scale: float) -> Factors:
    """Plain LoRA factors of one layer, at LoRA scale 1 (``r == lora_alpha``).

    Args:
        lora_a: rows ``a_i``, shape ``(r, in)``.
        gate: effective gates, shape ``(r,)``: exactly 0 where a component is pruned.
        lora_b: columns ``b_i``, shape ``(out, r)``.
        scale: the layer's ``s`` (:attr:`~dora_dist.adapter.layer.DynamicLoraLinear.scale`).

    Returns:
        ``(A (k, in), B (out, k))`` in float32 on the CPU, k = number of non-zero gates, with ``B A`` equal to the
        update ``scale * sum_i gate_i b_i a_i``.
    """
    kept = gate != 0
    folded_a = lora_a[kept].float()
    folded_b = lora_b[:, kept].float() * (gate[kept].float() * scale)
    return folded_a.cpu().contiguous(), folded_b.cpu().contiguous()


def common_rank(factors: Mapping[str, Factors]) -> int:
    """The rank that an adapter is padded to: the first of 8, 16, 32, ... that fits every module. vLLM accepts those."""
    widest = max((lora_a.shape[0] for lora_a, _ in factors.values()), default=1)
    return max(8, 1 << (widest - 1).bit_length())


def pad_rank(factors: Factors, rank: int) -> Factors:
    """The same update with ``rank`` components, the added ones zero. Shapes ``(rank, in)``, ``(out, rank)``."""
    lora_a, lora_b = factors
    missing = rank - lora_a.shape[0]
    if missing < 0:
        raise ValueError(f"cannot pad a layer of rank {lora_a.shape[0]} to rank {rank}")
    return (
        torch.nn.functional.pad(lora_a, (0, 0, 0, missing)),
        torch.nn.functional.pad(lora_b, (0, missing)),
    )


def without_padding(lora_a: Tensor, lora_b: Tensor) -> Factors:
    """The same update without the components whose two vectors are zero."""
    used = (lora_a != 0).any(1) | (lora_b != 0).any(0)
    return lora_a[used].contiguous(), lora_b[:, used].contiguous()


def write_lora_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    base_model: str | None,
    task_type: str = "CAUSAL_LM",
    head: Mapping[str, Mapping[str, Tensor]] | None = None,
    rank: int | None = None,
    keep_empty: bool = False,
    new_rows: NewRows | None = None,
) -> None:
    """Write plain LoRA factors as an adapter folder that PEFT, vLLM and llama.cpp load exactly, with its model card.

    Every module has the same rank, padded with zeros, and ``r == lora_alpha``. Modules of rank 0 are left out, unless
    ``keep_empty``.

    Args:
        folder: the folder to write, created if missing.
        factors: module name -> ``(A (k, in), B (out, k))`` from :func:`fold_components`.
        base_model: name or path of the base model, for ``base_model_name_or_path``; a folder's path is made absolute.
        task_type: PEFT's name of the task, such as ``CAUSAL_LM``.
        head: name of a module that was trained as a whole -> its parameters, by their names within it.
        rank: rank of every module; :func:`common_rank` by default.
        keep_empty: whether to write modules of rank 0 too, as zeros.
        new_rows: rows of new tokens that were trained beside the components.

    Raises:
        ValueError: no module is left to write.
    """
    present, base_model = _with_components(factors), absolute_base(base_model)
    rank = rank or common_rank(present)
    written = factors if keep_empty else present
    _check_any(written)
    padded = {name: pad_rank(parts, rank) for name, parts in sorted(written.items())}
    config = _lora_config(padded, base_model, task_type, rank, sorted(head or {}), new_rows)
    _write(folder, config, _named_tensors(padded, head or {}, new_rows))
    ranks = {name: lora_a.shape[0] for name, (lora_a, _) in present.items()}
    write_card(folder, ranks, base_model, rank, 0 if new_rows is None else len(new_rows.ids))


def write_compact_adapter(
    folder: Path, factors: Mapping[str, Factors], base_model: str | None, new_rows: NewRows | None = None
) -> None:
    """Write an adapter without padding: every module has its own rank.

    One ``lora_alpha`` holds for all modules, and B carries ``rank / lora_alpha``: so PEFT (``lora_alpha`` over the rank
    in ``rank_pattern``) and llama.cpp (over the rank of the tensor) compute the same. vLLM takes one rank only.

    Args:
        folder: the folder to write, created if missing.
        factors: see :func:`write_lora_adapter`.
        base_model: name or path of the base model.
        new_rows: see :func:`write_lora_adapter`.

    Raises:
        ValueError: every module has rank 0.
    """
    present, base_model = _with_components(factors), absolute_base(base_model)
    _check_any(present)
    ranks = {name: lora_a.shape[0] for name, (lora_a, _) in present.items()}
    alpha = max(ranks.values())
    folded = {name: (lora_a, lora_b * (ranks[name] / alpha)) for name, (lora_a, lora_b) in present.items()}
    config = _lora_config(folded, base_model, "CAUSAL_LM", alpha, [], new_rows)
    _write(folder, config, _named_tensors(folded, {}, new_rows))
    write_card(folder, ranks, base_model, None, 0 if new_rows is None else len(new_rows.ids))


def _with_components(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    return {name: parts for name, parts in sorted(factors.items()) if parts[0].shape[0]}


def _check_any(factors: Mapping[str, Factors]) -> None:
    if not factors:
        raise ValueError("no component of any layer has a non-zero gate: there is no adapter to write")


def _write(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _lora_config(
    factors: Mapping[str, Factors],
    base_model: str | None,
    task_type: str,
    rank: int,
    heads: Sequence[str],
    new_rows: NewRows | None,
) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        modules_to_save=list(heads) or None,
        rank_pattern={name: len(lora_a) for name, (lora_a, _) in factors.items() if len(lora_a) != rank},
        lora_dropout=0.0,
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
        trainable_token_indices=None if new_rows is None else {name: list(new_rows.ids) for name in new_rows.rows},
    )


def _named_tensors(
    factors: Mapping[str, Factors], head: Mapping[str, Mapping[str, Tensor]], new_rows: NewRows | None
) -> dict[str, Tensor]:
    """Tensors by the names under which PEFT saves them."""
    tensors = {}
    for name, (lora_a, lora_b) in factors.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = lora_b.contiguous()
    for module, parameters in head.items():
        for name, value in parameters.items():
            tensors[f"{KEY_PREFIX}{module}.{name}"] = value.detach().float().cpu().contiguous()
    for module, rows in ({} if new_rows is None else new_rows.rows).items():
        tensors[f"{KEY_PREFIX}{module}.{NEW_ROWS}"] = rows.detach().float().cpu().contiguous()
    return tensors


def no_plain_lora(config: Mapping[str, Any], tensors: Collection[str], apart: Collection[str] = ()) -> str:
    """The reason why an adapter is not plain LoRA, phrased to follow its name; empty if it is.

    Args:
        config: contents of ``adapter_config.json``.
        tensors: names of the tensors in ``adapter_model.safetensors``.
        apart: entries that the adapter may have beside plain LoRA: :data:`HEAD` or :data:`TOKEN_ROWS`.
    """
    if config.get("peft_type") != "LORA":
        return f"is of PEFT's type {config.get('peft_type')}"
    if (bias := config.get("bias", "none")) != "none":
        return f"has trained biases (bias: {bias})"
    if found := [name for name in BESIDE_THE_UPDATE if config.get(name) and name not in apart]:
        return f"has {found[0]}: {config[found[0]]}"
    if (start := config.get("init_lora_weights", True)) not in KEEP_THE_BASE:
        return f"has init_lora_weights: {start}, which has changed the base"
    parts = (".lora_A.weight", ".lora_B.weight")
    known = {key for key in tensors if key.startswith(KEY_PREFIX) and key.endswith(parts)}
    if strange := sorted(key for key in tensors if key not in known and not _is_apart(key, config, apart)):
        return f"has the tensor {strange[0]}"
    modules = {key.rsplit(".lora_", 1)[0] for key in known}
    lonely = [name for name in sorted(modules) if not all(f"{name}{part}" in known for part in parts)]
    return f"has {lonely[0]} with one factor only" if lonely else ""


def _is_apart(key: str, config: Mapping[str, Any], apart: Collection[str]) -> bool:
    if TOKEN_ROWS in apart and config.get(TOKEN_ROWS) and key.endswith(f".{NEW_ROWS}"):
        return True
    heads = (config.get(HEAD) or []) if HEAD in apart else []
    return any(f".{name}." in key for name in heads)


def read_layers(
    folder: Path, where: str, apart: Collection[str] = ()
) -> tuple[Mapping[str, Any], dict[str, FoundLora]]:
    """Read a folder of plain LoRA, written by this program or by PEFT.

    Args:
        folder: the adapter's folder.
        where: beginning of an error message, to be followed by what is wrong with the adapter.
        apart: entries that the caller reads elsewhere or does not need: :data:`HEAD` or :data:`TOKEN_ROWS`.

    Returns:
        The adapter's configuration, and module name -> factors, without components that are 0.

    Raises:
        ValueError: the folder holds no adapter, one that is not just plain LoRA, or one whose factors are not all
            finite.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{where} has no {name}: give the folder of a plain LoRA adapter, such as RUN/adapter (looked from "
                f"{Path.cwd()})"
            )
    try:
        config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except Exception as error:  # safetensors has one of its own, in Rust
        raise ValueError(f"{where} cannot be read: {error}") from None
    if reason := no_plain_lora(config, tensors, apart):
        raise ValueError(
            f"{where} {reason}: only plain LoRA can be taken from it, whose update is B A, and the rest would be lost. "
            "Use it with PEFT itself"
        )
    layers = {}
    for name in sorted({key.removeprefix(KEY_PREFIX).rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}):
        lora_a, lora_b = (tensors[f"{KEY_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
        if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            raise ValueError(f"{where} has factors of {name} that are not finite: take another checkpoint")
        used_a, used_b = without_padding(lora_a, lora_b)
        layers[name] = FoundLora(lora_a=used_a, lora_b=used_b, scale=_scale(config, name, len(lora_a)))
    return config, layers


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """PEFT's scale: alpha, by the pattern that matches the layer, over the rank or over its root (rsLoRA)."""
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
    return float(alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def read_lora_adapter(folder: Path, apart: Collection[str] = ()) -> dict[str, Factors]:
    """Plain LoRA factors of a folder at LoRA scale 1, in float32, by module name; padding is left out.

    Args:
        folder: folder of an adapter that this program or PEFT has written.
        apart: see :func:`read_layers`.

    Returns:
        Module name -> ``(A (k, in), B (out, k))``, where ``B A`` is the whole update. Modules of rank 0 are missing.

    Raises:
        ValueError: as in :func:`read_layers`.
    """
    _, layers = read_layers(folder, f"the adapter in {folder}", apart)
    return {name: (found.lora_a, found.lora_b * found.scale) for name, found in layers.items() if len(found.lora_a)}


def read_new_rows(folder: Path) -> NewRows | None:
    """Rows of tokens with which an adapter replaces the base's; None if it has none.

    Raises:
        ValueError: its modules have rows of different tokens.
    """
    found = read_json(folder / ADAPTER_CONFIG).get(TOKEN_ROWS)
    if not found:
        return None
    ids = list(found.values()) if isinstance(found, dict) else [found]
    if any(other != ids[0] for other in ids):
        raise ValueError(
            f"the adapter in {folder} has {TOKEN_ROWS}: {found}, but all modules must have rows of the same tokens: "
            "use it with PEFT itself"
        )
    ending = f".{NEW_ROWS}"
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    rows = {
        key.removeprefix(KEY_PREFIX).removesuffix(ending): value
        for key, value in tensors.items()
        if key.endswith(ending)
    }
    return NewRows(ids=ids[0], rows=rows)


def adapter_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of the weights in a folder of :func:`write_lora_adapter`: as they are, and without padding."""
    size = (folder / ADAPTER_WEIGHTS).stat().st_size
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        padded = sum(file.get_tensor(name).nbytes for name in file.keys() if ".lora_" in name)  # noqa: SIM118
    used = sum(part.nbytes for factors in read_lora_adapter(folder, (HEAD, TOKEN_ROWS)).values() for part in factors)
    return size, size - padded + used
