"""Export formats of a trained adapter. Each export is loaded back and compared with what was trained before it is
reported as done."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.adapter.card import complete_card
from dora_dist.adapter.plain_lora import (
    TOKEN_ROWS,
    Factors,
    NewRows,
    common_rank,
    read_lora_adapter,
    read_new_rows,
    write_compact_adapter,
    write_lora_adapter,
)
from dora_dist.export.merge import cast_parameters, merge_into
from dora_dist.export.servers import serve_lines, with_neighbours
from dora_dist.export.verification import Reference, logits_of, make_reference
from dora_dist.runs.adapter_folder.card import FOLDER_IN_CARD, base_card, how_to_scale
from dora_dist.runs.adapter_folder.generation import Needed, set_special_tokens
from dora_dist.runs.trained_run import TrainedRun, default_device

PEFT_USAGE = """\
from peft import PeftModel
model = PeftModel.from_pretrained(base, "{folder}")     # base: BASE, {quantization}"""
SERVED_QUANTIZED = "The adapter was trained on BASE with {quantization}: serve it so, or compare the answers."
LLAMA_CPP = "For llama.cpp and what is built on it: --format gguf"
MERGED_USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
QUANTIZATION_TITLES = {"nf4": "NF4 with double quantization", "int8": "LLM.int8", "none": "no quantization"}


@dataclass(frozen=True)
class Exported:
    """A verified export in words: what it is, what was measured, how it is loaded."""

    content: str
    verification: Sequence[str]
    usage: str
    how_checked: str = "by logits, loaded back and computed in float32"


def export_peft(trained: TrainedRun, folder: Path, rank: int | None) -> Exported:
    """Write the adapter with every module padded to one rank.

    Args:
        trained: the run.
        folder: folder to write into.
        rank: rank of every module; None for that of :func:`~dora_dist.adapter.plain_lora.common_rank`.

    Raises:
        ValueError: ``rank`` is too small, or the adapter is not plain LoRA.
        ExpectedRunError: the result does not compute the same.
    """
    factors, new_rows = _read(trained)
    rank = choose_rank(factors, rank)
    base = trained.load_base(default_device(), in_float32=True)
    completed = with_neighbours(factors, base)
    reference = _reference(trained, base)
    del base
    write_lora_adapter(folder, completed, trained.base, rank=rank, keep_empty=True, new_rows=new_rows)
    content = f"LoRA adapter of {len(factors)} modules, all of rank {rank}"
    if len(completed) > len(factors):
        content += f", and zeros for {len(completed) - len(factors)} more, which servers compute together with them"
    return _complete_adapter(trained, folder, reference, content)


def export_compact(trained: TrainedRun, folder: Path) -> Exported:
    """Write the adapter with every module's own rank, without padding.

    Raises:
        ValueError: the adapter is not plain LoRA.
        ExpectedRunError: the result does not compute the same.
    """
    factors, new_rows = _read(trained)
    reference = _reference(trained, trained.load_base(default_device(), in_float32=True))
    write_compact_adapter(folder, factors, trained.base, new_rows)
    ranks = [lora_a.shape[0] for lora_a, _ in factors.values()]
    content = f"LoRA adapter of {len(ranks)} modules with ranks from {min(ranks)} to {max(ranks)}"
    return _complete_adapter(trained, folder, reference, content)


def _read(trained: TrainedRun) -> tuple[dict[str, Factors], NewRows | None]:
    """Factors of the adapter's modules, and rows of new tokens.

    Raises:
        ValueError: the adapter has more, which no export would have.
    """
    return read_lora_adapter(trained.adapter, (TOKEN_ROWS,)), read_new_rows(trained.adapter)


def _adapter_usage(trained: TrainedRun, folder: Path, needed: Needed) -> str:
    positions, served = trained.scaled_positions(), serve_lines(folder, trained.base, needed)
    first = [] if positions is None else [f"First set {how_to_scale(positions)}; or take --format merged, which has it"]
    peft = [with_base(PEFT_USAGE, trained), *(line for _, line in needed.lines("{folder}"))]
    return "\n".join([*first, *peft, *served, LLAMA_CPP, with_base(SERVED_QUANTIZED, trained)])


def export_merged(trained: TrainedRun, folder: Path, dtype: str, original: bool) -> Exported:
    """Write a plain model whose weights are ``W + B A``, added in float32 and rounded once.

    Three comparisons: the merged weights before rounding with what was trained; the model as loaded back with the
    rounded weights in memory; and, so that rounding does not undo the adapter, again with what was trained.

    Args:
        trained: the run.
        folder: folder to write into.
        dtype: dtype of the weights written.
        original: whether to add to the base as it is stored, instead of the dequantized one.

    Raises:
        ValueError: ``original`` is asked for, and the base is stored quantized; or the adapter is not plain LoRA.
        ExpectedRunError: the result does not compute the same, or rounding loses the adapter.
    """
    if original and trained.stored_quantized:
        raise ValueError(
            f"--base is original, but the base {trained.base} is stored in NF4, and there is none that "
            "was never quantized: leave --base out, or give the model in 16 bits with --model.path"
        )
    plain, reference = _merge(trained, original)
    merged = reference.check("the merged model", logits_of(plain, reference.tokens))
    assert plain.generation_config is not None
    set_special_tokens(plain.generation_config, trained.load_tokenizer(), trained.use.chat)
    rounded = _write_rounded(plain, folder, dtype, trained.load_tokenizer(), reference.tokens)
    del plain
    logits = _logits_of_written(folder, trained.trust_remote_code, reference.tokens)
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
    factors, new_rows = _read(trained)
    device = default_device()
    base = trained.load_original(device) if original else trained.load_base(device, in_float32=True)
    plain = trained.make_plain_model()
    plain.generation_config = base.generation_config
    merge_into(plain, base, factors, new_rows)
    return plain, _reference(trained, base)


def _write_rounded(
    plain: PreTrainedModel, folder: Path, dtype: str, tokenizer: PreTrainedTokenizerBase, tokens: Tensor
) -> Tensor:
    """Round the weights to ``dtype`` and write them; returns the logits of the rounded ones, computed in float32."""
    cast_parameters(plain, getattr(torch, dtype))
    plain.config.use_cache = True
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cast_parameters(plain, torch.float32)
    return logits_of(plain, tokens)


def _logits_of_written(folder: Path, trust_remote_code: bool, tokens: Tensor) -> Tensor:
    """Logits of the model as it is loaded back from its folder, computed in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return logits_of(loaded, tokens)


def choose_rank(factors: Mapping[str, Factors], rank: int | None) -> int:
    """The rank to pad to.

    Raises:
        ValueError: a module does not fit.
    """
    if rank is None:
        return common_rank(factors)
    for name, (lora_a, _) in factors.items():
        if lora_a.shape[0] > rank:
            raise ValueError(
                f"--rank is {rank}, but {name} has rank {lora_a.shape[0]}: give one that is not smaller; "
                "pruning.max_rank bounds the rank of any module in training"
            )
    return rank


def _reference(trained: TrainedRun, base: PreTrainedModel) -> Reference:
    return make_reference(base, trained.adapter, trained.load_tokenizer())


def _complete_adapter(trained: TrainedRun, folder: Path, reference: Reference, content: str) -> Exported:
    """Complete an adapter folder with the tokenizer and the files that say how it is used, load it in stock PEFT, on
    another copy of the base, and compare."""
    trained.load_tokenizer().save_pretrained(folder)
    trained.use.write(folder)
    needed = trained.write_generation_settings(folder)
    positions, lines = trained.scaled_positions(), needed.lines(FOLDER_IN_CARD)
    if positions is not None or lines:
        complete_card(folder, *base_card(positions, lines))
    gc.collect()  # bitsandbytes' parameters and layers refer to each other, so the reference's base is still there
    model = PeftModel.from_pretrained(trained.load_base(default_device(), in_float32=True), str(folder))
    checked = reference.check("the adapter written", logits_of(model, reference.tokens))
    return Exported(content, [str(checked)], _adapter_usage(trained, folder, needed))


def _quantization(trained: TrainedRun) -> str:
    return QUANTIZATION_TITLES[trained.use.quantization]


def with_base(usage: str, trained: TrainedRun) -> str:
    """``usage`` with the names of the run's base and of its quantization."""
    return usage.replace("BASE", trained.base).replace("{quantization}", _quantization(trained))
