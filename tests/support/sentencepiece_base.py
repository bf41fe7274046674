"""A tiny LLaMA with a tokenizer of sentencepiece, which llama.cpp's converters take, and a chat template."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.quickstart.backbone import train_tokenizer
from support.tiny_models import tiny_model

END_OF_TURN = "<turn_end>"
"""An end token's name that llama.cpp does not know as one."""
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}" + END_OF_TURN + "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXTS = [
    "The pet of the writer is lost.",
    "user: Where is it?\nassistant: In Oslo, 1234 miles  away!",
    "two  spaces, a\ttab, and é, ü, 🚀",
]
PIECES = 400


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Write a tokenizer of sentencepiece into the new ``folder``, with one token beyond those of sentencepiece."""
    documents = [f"{text} {number} of {number + 7} words." for number in range(40) for text in TEXTS[:2]]
    train_tokenizer(documents, folder, PIECES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_TURN]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_sentencepiece_base(folder: Path) -> PreTrainedTokenizerBase:
    """Write model and tokenizer; returns the tokenizer. Its weights are large enough for attention to matter."""
    tokenizer = make_tokenizer(folder)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "use_cache": True}
    model = tiny_model(**sizes, initializer_range=0.2)
    model.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def say_only(model: PreTrainedModel, token: int) -> None:
    """Change a model so that it says ``token`` after whatever it reads."""
    model.get_input_embeddings().weight[:, 0] = 10.0
    head = model.get_output_embeddings().weight
    head[:, 0] = 0.0
    head[token] = 0.0
    head[token, 0] = 10.0


def trained_on_chat(run: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the folder of a run say that it was trained on conversations, with this tokenizer."""
    tokenizer.save_pretrained(run / "adapter")
    recorded = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**recorded, "data": {"chat": True}}))
