"""The adapter and the merged model as GGUF, by llama.cpp's own converters.

Before any weight is read, the converter writes the vocabulary alone, and that is compared with the run's tokenizer: a
converter that knows a tokenizer only in part writes a file that loads, and reads other tokens than were trained.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from dora_dist.adapter.plain_lora import (
    TOKEN_ROWS,
    Factors,
    read_lora_adapter,
    read_new_rows,
    write_lora_adapter,
)
from dora_dist.console import files
from dora_dist.console.errors import ExpectedRunError
from dora_dist.data.encoding.chat import PROBE
from dora_dist.export.formats import Exported, export_merged, with_base
from dora_dist.export.llama_cpp import ADAPTER, MERGED, LlamaCpp
from dora_dist.export.read_gguf import update_norm
from dora_dist.runs.adapter_folder.generation import end_tokens
from dora_dist.runs.trained_run import TrainedRun

OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of tokens in GGUF. Those of the last three are read as one token wherever their text stands."""
FURTHER_ENDS = ("eot", "eom")
"""Names that GGUF has for end tokens beside ``eos``; llama.cpp stops at each."""
SENTENCEPIECE, WORD = "tokenizer.model", "▁"
NORM_TOLERANCE = 1e-4
"""Largest share by which the size of a module's update may differ when it is read back: both are float32."""
ADAPTER_CHECKED = f"the size of every update in {ADAPTER}.gguf, as read back, against that of the run"
MERGED_CHECKED = f"the logits of the merged model before its conversion, in float32, and the tokens in {MERGED}.gguf"
ADAPTER_USAGE = """\
llama-server -m base.gguf --lora {folder}/adapter.gguf
base.gguf is made by python {llama.cpp}/convert_hf_to_gguf.py {base} --outfile base.gguf
The adapter was trained on BASE with {quantization}. Answers end with {ends}; llama.cpp stops where base.gguf says."""
MERGED_USAGE = "llama-server -m {folder}/merged.gguf     # or llama-cli, llama-quantize; it stops at {ends}"


def export_gguf(
    trained: TrainedRun, folder: Path, llama_cpp: LlamaCpp, parts: Sequence[str], dtype: str, original: bool
) -> Exported:
    """Write ``adapter.gguf`` and ``merged.gguf``, or one of them.

    Args:
        trained: the run.
        folder: folder to write into; it has to hold the merged model twice for a while.
        llama_cpp: llama.cpp with its converters.
        parts: one or both of :data:`~dora_dist.export.llama_cpp.PARTS`.
        dtype: dtype of the merged weights.
        original: whether to merge into the base as it is stored, instead of the dequantized one.

    Raises:
        ValueError: the converters cannot write base, tokenizer or adapter as they are.
        ExpectedRunError: the result does not compute the same.
    """
    factors = _factors_for_gguf(trained) if ADAPTER in parts else None
    scratch, tokenizer = folder / "scratch", trained.load_tokenizer()
    base = scratch / "base"
    trained.load_model_config().save_pretrained(base)
    tokenizer.save_pretrained(base)
    ends = end_tokens(tokenizer, trained.use.chat, trained.generation_settings())
    written = []
    if MERGED in parts:
        complete_tokenizer(base, tokenizer, trained.base, trained.use.chat)
        llama_cpp.convert_model(base, scratch / "vocabulary.gguf", "f32", "--vocab-only")
        further_ends(ends, tokenizer)
        check_vocabulary(llama_cpp.read(scratch / "vocabulary.gguf")["fields"], tokenizer, trained.use.chat)
    if factors is not None:
        written.append(_write_adapter(trained, folder, llama_cpp, factors))
    if MERGED in parts:
        written.append(_write_merged(trained, folder, llama_cpp, dtype, original))
    shutil.rmtree(scratch)
    said = " and ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in ends)
    path = trained.base
    usage = with_base("\n".join(part.usage for part in written), trained).replace("{ends}", said)
    usage = usage.replace("{base}", path if Path(path).expanduser().is_dir() else f"--remote {path}")
    return Exported(
        content="\n  ".join(part.content for part in written),
        verification=[line for part in written for line in part.verification],
        usage=usage.replace("{llama.cpp}", str(llama_cpp.folder)),
        how_checked="; ".join(part.how_checked for part in written),
    )


def _factors_for_gguf(trained: TrainedRun) -> dict[str, Factors]:
    """Factors of the adapter, which ``adapter.gguf`` can hold.

    Raises:
        ValueError: the adapter has more, or goes with a scaling of positions, which the file cannot hold.
    """
    if read_new_rows(trained.adapter) is not None:
        raise ValueError(
            f"the adapter of {trained.folder} has rows of new tokens (adapter.new_tokens, PEFT's {TOKEN_ROWS}), and a "
            f"GGUF adapter has no place for rows of the embedding: give --part {MERGED}, whose weights have them"
        )
    if trained.use.rope_scaling is not None:
        raise ValueError(
            f"{trained.folder} was trained with model.rope_scaling, and a GGUF adapter goes with a file of the base, "
            f"which llama.cpp's converter makes of it as it is stored: give --part {MERGED}, which has the scaling"
        )
    return read_lora_adapter(trained.adapter)


def complete_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base_path: str, chat: bool) -> None:
    """Add what the converter reads and transformers does not write, where the base has it.

    Without ``tokenizer.model`` the converter gives all pieces of sentencepiece one score, and llama.cpp merges others
    than the tokenizer; without the table of added tokens they have no text.

    Args:
        folder: folder of the tokenizer's files.
        tokenizer: the run's tokenizer.
        base_path: folder or name of the base.
        chat: whether the run was trained in the tokenizer's chat template.
    """
    file = folder / "tokenizer_config.json"
    added = {
        str(number): {"content": token.content, "special": token.special}
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    completed = {**files.read_json(file), "added_tokens_decoder": added}
    with suppress(OSError):  # only tokenizers of sentencepiece have it
        found = cached_file(os.path.expanduser(base_path), SENTENCEPIECE)
        if found is not None:
            shutil.copyfile(found, folder / SENTENCEPIECE)
            completed["add_prefix_space"] = marks_first_word(tokenizer, chat)
    files.write_json(file, completed)


def marks_first_word(tokenizer: PreTrainedTokenizerBase, chat: bool) -> bool:
    """Whether sentencepiece's mark of a word is put before the first text of a prompt.

    Most tokenizers put it at the beginning and not behind a control token. llama.cpp has one setting for both, which
    must be right for the place where the prompts of the run begin.

    Args:
        tokenizer: the run's tokenizer.
        chat: whether the run was trained in the tokenizer's chat template.
    """
    begin = ""
    if chat:
        prompt = tokenizer.apply_chat_template(PROBE[:1], tokenize=False, add_generation_prompt=True)
        first = tokenizer(prompt, add_special_tokens=False)["input_ids"][0]
        begin = tokenizer.added_tokens_decoder[first].content if first in tokenizer.added_tokens_decoder else ""
    tokens = tokenizer(f"{begin}x", add_special_tokens=False).tokens()
    return bool(tokens[1 if begin else 0].startswith(WORD))


def further_ends(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Names in GGUF for all end tokens but the first, which the converter writes as ``eos``.

    Raises:
        ValueError: GGUF has not enough names.
    """
    further = ends[1:]
    if len(further) > len(FURTHER_ENDS):
        raise ValueError(
            f"the merged model stops at {len(ends)} tokens ({', '.join(tokenizer.convert_ids_to_tokens(list(ends)))}), "
            f"but a GGUF file has room for {1 + len(FURTHER_ENDS)}: remove those that no answer ends with from "
            "eos_token_id in the base's generation_config.json, or take --format merged"
        )
    return dict(zip(FURTHER_ENDS, further, strict=False))


def check_vocabulary(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    """Compare the vocabulary in a GGUF file with the tokenizer that the run was trained with.

    Args:
        fields: the file's fields ``tokenizer.*``, by their names.
        tokenizer: the run's tokenizer.
        chat: whether the run was trained in the tokenizer's chat template.

    Raises:
        ValueError: llama.cpp would read other tokens.
    """
    texts, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    wanted = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = tokenizer.added_tokens_decoder
    for number, text in enumerate(wanted):
        found = texts[number] if number < len(texts) else None
        if found not in (text, text.replace(WORD, " ")):
            raise _other_tokens(f"token {number} is {text!r} in the run's tokenizer, and {found!r} in the file")
        if number in added and added[number].special and types[number] not in (UNKNOWN, CONTROL, USER_DEFINED):
            raise _other_tokens(f"token {number} ({text!r}) is a special one, and not so in the file")
    if fields["tokenizer.ggml.model"] == "llama":
        scores = {score for score, kind in zip(fields["tokenizer.ggml.scores"], types, strict=True) if kind == NORMAL}
        if len(scores) < 2:
            raise _other_tokens(
                f"all pieces have the same score, since the base has no {SENTENCEPIECE}: put that file into its folder"
            )
        if fields.get("tokenizer.ggml.add_space_prefix", True) != marks_first_word(tokenizer, chat):
            raise _other_tokens("before the first text of a prompt stands a mark of a word in one and not in the other")
    if fields.get("tokenizer.ggml.eos_token_id") != tokenizer.eos_token_id:
        raise _other_tokens(
            f"the end token is {tokenizer.eos_token_id} in the run's tokenizer, and "
            f"{fields.get('tokenizer.ggml.eos_token_id')} in the file"
        )
    if chat and fields.get("tokenizer.chat_template") != tokenizer.get_chat_template():
        raise _other_tokens("the chat template is not the one that the run was trained in")


def _other_tokens(flaw: str) -> ValueError:
    return ValueError(
        f"with the vocabulary that llama.cpp's converter writes, llama.cpp would read other tokens: {flaw}. --format "
        "merged and peft are not affected, nor is --part adapter, for a GGUF file of the base that you have"
    )


def _write_adapter(trained: TrainedRun, folder: Path, llama_cpp: LlamaCpp, factors: Mapping[str, Factors]) -> Exported:
    plain, file = folder / "scratch" / "adapter", folder / f"{ADAPTER}.gguf"
    write_lora_adapter(plain, factors, trained.base)
    llama_cpp.convert_adapter(plain, folder / "scratch" / "base", file)
    worst = check_updates(llama_cpp.read(file)["updates"], factors)
    return Exported(
        f"{file.name}: LoRA adapter of {len(factors)} modules in float32",
        [f"{file.name}, read back           updates of {len(factors)} modules, sizes differ by {worst:.0e} at most"],
        ADAPTER_USAGE,
        ADAPTER_CHECKED,
    )


def check_updates(found: Sequence[float], factors: Mapping[str, Factors]) -> float:
    """Compare the updates in an adapter's file, by their sizes, with those of the run.

    Args:
        found: Frobenius norms of the file's updates by llama.cpp's scale, in ascending order.
        factors: the run's, as :func:`~dora_dist.adapter.plain_lora.read_lora_adapter` reads them.

    Returns:
        The largest relative difference.

    Raises:
        ExpectedRunError: one is missing, or has another size.
    """
    wanted = sorted(update_norm(a.numpy(), b.numpy(), alpha=a.shape[0]) for a, b in factors.values())
    apart = [abs(one - other) / other for one, other in zip(found, wanted, strict=False)]
    if len(found) != len(wanted) or not max(apart) <= NORM_TOLERANCE:
        raise ExpectedRunError(
            f"the adapter's file does not hold what was trained: {len(found)} updates, where the run has "
            f"{len(wanted)}, with sizes that differ by {max(apart, default=0.0):.1e}; allowed is {NORM_TOLERANCE:.0e}. "
            "Nothing was written"
        )
    return max(apart)


def _write_merged(trained: TrainedRun, folder: Path, llama_cpp: LlamaCpp, dtype: str, original: bool) -> Exported:
    tokenizer, plain, file = trained.load_tokenizer(), folder / "scratch" / MERGED, folder / f"{MERGED}.gguf"
    merged = export_merged(trained, plain, dtype, original)
    ends = end_tokens(tokenizer, trained.use.chat, GenerationConfig.from_pretrained(plain))
    complete_tokenizer(plain, tokenizer, trained.base, trained.use.chat)
    llama_cpp.convert_model(plain, file, OUTTYPES[dtype], "--model-name", trained.folder.resolve().name)
    shutil.rmtree(plain)
    named = further_ends(ends, tokenizer)
    llama_cpp.set_tokens(file, named)
    fields = llama_cpp.read(file)["fields"]
    check_vocabulary(fields, tokenizer, trained.use.chat)
    missing = [name for name, token in named.items() if fields.get(f"tokenizer.ggml.{name}_token_id") != token]
    if missing:
        raise ExpectedRunError(f"the file of the merged model has no end token {missing[0]}. Nothing was written")
    read = f"{file.name}, read back           {len(tokenizer)} tokens, end tokens {', '.join(map(str, ends))}"
    return Exported(f"{file.name}: {merged.content}", [*merged.verification, read], MERGED_USAGE, MERGED_CHECKED)
