"""The model card of an adapter, which tells whoever finds the folder later what it is."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2405.17357"
NOT_WEIGHT_DECOMPOSED = "This is not weight-decomposed DoRA (`use_dora` of PEFT), which shares the name."

PADDED = "They are padded with zeros to rank {} in every module, which PEFT, vLLM and llama.cpp take."
MIXED = (
    "Every module has its own rank, which PEFT and llama.cpp take, and of vLLM only versions that read rank_pattern."
)

NEW_TOKENS = """
It has the rows of {} new tokens too, which the tokenizer in this folder knows. Where the base has fewer rows than this
tokenizer has tokens, `base.resize_token_embeddings(len(tokenizer))` comes first; `AutoPeftModelForCausalLM` does so.
"""


def absolute_base(base_model: str | None) -> str | None:
    """A base by a name that means the same everywhere: a folder by its absolute path, a name on the Hub as it is."""
    if base_model is not None and Path(base_model).is_dir():
        return str(Path(base_model).resolve())
    return base_model


def write_card(
    folder: Path, ranks: Mapping[str, int], base_model: str | None, padded: int | None, new_tokens: int = 0
) -> None:
    """Write the card of a plain LoRA adapter into its folder, with what the adapter itself tells.

    Args:
        folder: the adapter's folder, which exists.
        ranks: module name -> rank, for all modules that have components.
        base_model: name or absolute path of the base model.
        padded: rank that the factors are padded to with zeros; None where every module has its own rank.
        new_tokens: number of new tokens that the adapter has rows for.
    """
    total = sum(ranks.values())
    low, high = min(ranks.values(), default=0), max(ranks.values(), default=0)
    text = f"""# LoRA adapter{_for(base_model)}

{total} rank-one components in {len(ranks)} modules, ranks {low} to {high}, written by dora-dist, a trainer of
[Dynamic Low-Rank Adaptation]({PAPER}) (DoRA, ACL 2024). {NOT_WEIGHT_DECOMPOSED}

The folder holds plain LoRA factors. {PADDED.format(padded) if padded else MIXED} PEFT loads them as they are:

    from peft import PeftModel
    model = PeftModel.from_pretrained(base, "path/to/this/folder")
"""
    if new_tokens:
        text += NEW_TOKENS.format(new_tokens)
    _save(folder, _metadata(base_model, "peft", ["lora", "dynamic-lora", "dora-dist"]), text)


def write_routed_card(folder: Path, rank: int, num_modules: int, chosen: int, base_model: str | None) -> None:
    """Write the card of a prompt-routed adapter, which PEFT cannot load, into its folder.

    Args:
        folder: the adapter's folder, which exists.
        rank: rank of every module.
        num_modules: number of adapted modules.
        chosen: number of modules chosen in a block for a prompt.
        base_model: name or absolute path of the base model.
    """
    text = f"""# Prompt-routed LoRA adapter{_for(base_model)}

A router in every block chooses for each prompt the {chosen} modules whose update is applied (MiLoRA, EMNLP 2024): LoRA
of rank {rank} in {num_modules} modules. It cannot be folded into plain LoRA, so that PEFT, vLLM and llama.cpp cannot
load it. The package dora-dist does:

    import dora_dist
    model = dora_dist.load_adapter(base, "path/to/this/folder")
"""
    _save(folder, _metadata(base_model, "dora-dist", ["lora", "milora", "dora-dist"]), text)


def complete_card(folder: Path, data: Mapping[str, Any], text: str) -> None:
    """Add what a run knows about its adapter to the card in the adapter's folder.

    Args:
        folder: the adapter's folder, which has a card.
        data: further metadata, by the Hub's names for them.
        text: Markdown to append to the card.
    """
    card = ModelCard.load(folder / CARD)
    _save(folder, ModelCardData(**{**card.data.to_dict(), **data}), f"{card.text.strip()}\n\n{text}")


def set_last_section(folder: Path, title: str, table: str) -> None:
    """Put a table under a title at the end of the card in an adapter's folder, in place of an earlier one.

    Args:
        folder: the adapter's folder, which has a card.
        title: title of the section.
        table: the table, as lines of text.
    """
    card = ModelCard.load(folder / CARD)
    before = card.text.partition(f"\n## {title}\n")[0]
    _save(folder, card.data, f"{before.strip()}\n\n## {title}\n\n{textwrap.indent(table, '    ')}\n")


def _for(base_model: str | None) -> str:
    return f" for `{' '.join(base_model.replace('`', '').split())}`" if base_model else ""


def _metadata(base_model: str | None, library: str, tags: list[str]) -> ModelCardData:
    """Metadata of a card. A base is named only if it is on the Hub, which refuses a card with the path of a folder."""
    known = base_model is not None and not Path(base_model).is_absolute()
    return ModelCardData(base_model=base_model if known else None, library_name=library, tags=tags)


def _save(folder: Path, data: ModelCardData, text: str) -> None:
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")
