"""Export formats of a trained adapter. Each export is loaded back and compared with what was trained before it is
reported as done."""

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.adapter.plain_lora import ADAPTER_WEIGHTS, pad_rank, read_lora_adapter, write_lora_adapter
from dora_dist.adapter.targets import resolve_targets
from dora_dist.base_model.shape import linear_layer
from dora_dist.export.merge import cast_parameters, merge_into
from dora_dist.export.verification import Difference, Reference, logits_of, make_reference
from dora_dist.runs.trained_run import TrainedRun, default_device

Factors = tuple[Tensor, Tensor]

PEFT_USAGE = """\
from peft import PeftModel
model = PeftModel.from_pretrained(base, "{folder}")     # base: BASE, {quantization}"""
UNIFORM_USAGE = """\
vllm serve BASE --enable-lora --max-lora-rank RANK --lora-modules NAME={folder}
python convert_lora_to_gguf.py --base BASE {folder}     # of llama.cpp
The adapter was trained on BASE with {quantization}: serve it so, or compare the answers."""
MERGED_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
QUANTIZATION_TITLES = {"nf4": "NF4 with double quantization", "int8": "LLM.int8", "none": "no quantization"}


@dataclass(frozen=True)
class Exported:
    """What there is to say about a verified export: what it is, what was measured, how it is loaded."""

    content: str
    verification: Sequence[str]
    usage: str


def export_peft(trained: TrainedRun, folder: Path) -> Exported:
    """Copy the adapter as it is.

    Raises:
        ExpectedRunError: the copy does not compute the same.
    """
    reference = _reference(trained, trained.load_base(default_device(), in_float32=True))
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        shutil.copyfile(trained.adapter / name, folder / name)
    trained.load_tokenizer().save_pretrained(folder)
    found = _check_adapter(trained, folder, reference)
    ranks = [lora_a.shape[0] for lora_a, _ in read_lora_adapter(folder).values()]
    content = f"LoRA adapter of {len(ranks)} modules with ranks from {min(ranks)} to {max(ranks)}"
    return Exported(content, [str(found)], _with_base(PEFT_USAGE, trained))


def export_uniform(trained: TrainedRun, folder: Path, rank: int | None, ranks: Sequence[int]) -> Exported:
    """Write the adapter with every module padded to one rank.

    Args:
        trained: the run.
        folder: to write into.
        rank: of every module, or None for the smallest of ``ranks`` that fits.
        ranks: to choose from, in order.

    Raises:
        ValueError: ``rank`` is too small, or all of ``ranks`` are.
        ExpectedRunError: the result does not compute the same.
    """
    factors = read_lora_adapter(trained.adapter)
    rank = choose_rank(factors, rank, ranks)
    base = trained.load_base(default_device(), in_float32=True)
    names = resolve_targets(base, trained.config.adapter.target_modules)
    padded = {name: pad_rank(factors.get(name) or _no_components(base, name), rank) for name in names}
    targets = short_targets(base, names)
    reference = _reference(trained, base)
    write_lora_adapter(folder, padded, trained.config.model.path, target_modules=targets)
    trained.load_tokenizer().save_pretrained(folder)
    found = _check_adapter(trained, folder, reference)
    empty = len(padded) - len(factors)
    content = f"LoRA adapter of {len(padded)} modules, all of rank {rank} ({empty} of them without a component)"
    usage = _with_base(PEFT_USAGE + "\n" + UNIFORM_USAGE, trained).replace("RANK", str(rank))
    return Exported(content, [str(found)], usage)


def export_merged(trained: TrainedRun, folder: Path, dtype: str, original: bool) -> Exported:
    """Write a plain model whose weights are ``W + B A``, added in float32 and rounded once.

    Three comparisons: the merged weights before rounding with what was trained; the model as loaded back with the
    rounded weights in memory; and, so that rounding does not undo the adapter, again with what was trained.

    Args:
        trained: the run.
        folder: to write into.
        dtype: of the weights written.
        original: add to the base as it is stored, instead of the dequantized one.

    Raises:
        ExpectedRunError: the result does not compute the same, or rounding loses the adapter.
    """
    plain, reference = _merge(trained, original)
    merged = reference.check("the merged model", logits_of(plain, reference.tokens))
    rounded = _write_rounded(plain, folder, dtype, trained.load_tokenizer(), reference.tokens)
    del plain
    logits = _logits_of_written(folder, trained.config.model.trust_remote_code, reference.tokens)
    reread = reference.check("the model loaded back", logits, wanted=rounded)
    final = reference.check_rounded("the merged model", logits, dtype)
    kind = "the base as stored" if original else f"the base as trained on ({_quantization(trained)}), dequantized,"
    return Exported(
        f"plain {dtype} model: {kind} plus the adapter's update",
        [
            f"merged, before rounding      {merged}",
            f"loaded back, against memory  {reread}",
            f"loaded back, as {dtype:<12} {final}",
        ],
        MERGED_USAGE,
    )


def _merge(trained: TrainedRun, original: bool) -> tuple[PreTrainedModel, Reference]:
    """The merged model in float32 on the CPU, and what it is compared with; the base itself is gone again."""
    device = default_device()
    base = trained.load_original(device) if original else trained.load_base(device, in_float32=True)
    plain = trained.load_original("cpu")
    merge_into(plain, base, read_lora_adapter(trained.adapter))
    return plain, _reference(trained, base)


def _write_rounded(
    plain: PreTrainedModel, folder: Path, dtype: str, tokenizer: PreTrainedTokenizerBase, tokens: Tensor
) -> Tensor:
    """Round the weights to ``dtype`` and write them; returns the logits of the rounded ones, computed in float32."""
    cast_parameters(plain, getattr(torch, dtype))
    plain.config.use_cache = True
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(plain.generation_config, name, getattr(tokenizer, name))
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cast_parameters(plain, torch.float32)
    return logits_of(plain, tokens)


def _logits_of_written(folder: Path, trust_remote_code: bool, tokens: Tensor) -> Tensor:
    """Logits of the model as it is loaded back from its folder, computed in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return logits_of(loaded, tokens)


def choose_rank(factors: Mapping[str, Factors], rank: int | None, ranks: Sequence[int]) -> int:
    """The rank to pad to.

    Raises:
        ValueError: the widest module does not fit.
    """
    widest = max(factors, key=lambda name: factors[name][0].shape[0])
    width = factors[widest][0].shape[0]
    if rank is None:
        rank = next((choice for choice in ranks if choice >= width), ranks[-1])
    if rank < width:
        raise ValueError(
            f"--rank is {rank}, but {widest} has rank {width}: it takes one of {', '.join(map(str, ranks))} that is "
            "not smaller; pruning.max_rank bounds the rank of any module in training"
        )
    return rank


def short_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Last parts of the names where they mean just these modules of the model, otherwise the names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return endings if meant == set(names) else sorted(names)


def _no_components(model: nn.Module, name: str) -> Factors:
    layer = linear_layer(model, name)
    return torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0)


def _reference(trained: TrainedRun, base: PreTrainedModel) -> Reference:
    return make_reference(base, trained.adapter, trained.load_tokenizer())


def _check_adapter(trained: TrainedRun, folder: Path, reference: Reference) -> Difference:
    """Load an adapter folder in stock PEFT, on a base of its own, and compare."""
    gc.collect()  # bitsandbytes' parameters and layers refer to each other, so the reference's base is still there
    model = PeftModel.from_pretrained(trained.load_base(default_device(), in_float32=True), str(folder))
    return reference.check("the adapter written", logits_of(model, reference.tokens))


def _quantization(trained: TrainedRun) -> str:
    return QUANTIZATION_TITLES[trained.config.model.quantization]


def _with_base(usage: str, trained: TrainedRun) -> str:
    return usage.replace("BASE", trained.config.model.path).replace("{quantization}", _quantization(trained))
