"""The model card of an adapter: what it is, for whoever finds the folder later."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2405.17357"
NOT_WEIGHT_DECOMPOSED = "This is not weight-decomposed DoRA (`use_dora` of PEFT), which shares the name."

PADDED = "They are padded with zeros to rank {} in every module, which PEFT, vLLM and llama.cpp take."
MIXED = "Every module has its own rank, which PEFT and llama.cpp take and vLLM does not."


def write_card(folder: Path, ranks: Mapping[str, int], base_model: str | None, padded: int | None) -> None:
    """Write ``README.md`` into an adapter's folder.

    Args:
        folder: exists.
        ranks: module name -> rank, of all modules that have one.
        base_model: name or path of the base model.
        padded: rank that the factors are padded to with zeros; None where every module has its own.
    """
    data = ModelCardData(base_model=base_model, library_name="peft", tags=["lora", "dynamic-lora", "dora-dist"])
    total, low, high = sum(ranks.values()), min(ranks.values()), max(ranks.values())
    text = f"""---
{data.to_yaml()}
---

# LoRA adapter{f" for {base_model}" if base_model else ""}

[Dynamic Low-Rank Adaptation]({PAPER}) (DoRA, ACL 2024) chose the rank of every layer while it trained this adapter:
{total} rank-one components in {len(ranks)} modules, ranks {low} to {high}. {NOT_WEIGHT_DECOMPOSED}

The folder holds plain LoRA factors. {PADDED.format(padded) if padded else MIXED} PEFT loads them as they are:

    from peft import PeftModel
    model = PeftModel.from_pretrained(base, "path/to/this/folder")
"""
    (folder / CARD).write_text(text, encoding="utf-8")
