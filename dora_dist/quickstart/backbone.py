"""The quickstart's backbone: a sentencepiece tokenizer and a small LLaMA, trained here and saved as Hugging Face does.

torch, transformers and sentencepiece are imported inside the functions: a cached quickstart must not wait for them.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, LlamaTokenizer

UNKNOWN_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3


@dataclass(frozen=True)
class BackboneSettings:
    """Sizes of the model and length of its pretraining. `steps` are optimizer steps; `length` is in tokens."""

    vocabulary: int = 1024
    hidden: int = 128
    intermediate: int = 256
    layers: int = 5
    heads: int = 4
    positions: int = 256
    documents: int = 16000
    batch: int = 16
    length: int = 64
    steps: int = 600
    learning_rate: float = 4e-3


def train_tokenizer(documents: Iterable[str], folder: Path, vocabulary: int) -> "LlamaTokenizer":
    """Train a byte-fallback BPE model as LLaMA's is, write it to `folder/tokenizer.model`, and wrap it.

    Line breaks stay out of the vocabulary, as in LLaMA: they are the byte token <0x0A>. The wrapped tokenizer prepends
    bos and never appends eos.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    model_file = folder / "tokenizer.model"
    with open(model_file, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            # A line break splits words like any other character that is no letter, so "|" stands in for it here: a word
            # that starts a line gets a piece without the word mark, and the line break itself gets none.
            sentence_iterator=(document.replace("\n", "|") for document in documents),
            model_writer=stream,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=UNKNOWN_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            pad_piece="<pad>",
            num_threads=1,
            minloglevel=2,
        )
    tokenizer = LlamaTokenizer.from_pretrained(folder, pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_stream(documents: Sequence[str], model_file: Path, seed: int) -> "torch.Tensor":
    """Return one int64 vector (num_tokens,): every document as bos, pieces, eos."""
    import sentencepiece
    import torch

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    encoded = processor.encode(list(documents), add_bos=True, add_eos=True, num_threads=1)
    return torch.tensor([token for document in encoded for token in document])


def build_model(settings: BackboneSettings, vocabulary: int, seed: int) -> "LlamaForCausalLM":
    """Return an untrained LLaMA; all its linear layers have sides that are multiples of 64, the block of NF4."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def pretrain(model: "LlamaForCausalLM", stream: "torch.Tensor", settings: BackboneSettings) -> float:
    """Train `model` in place on `stream`, one pass in order, and return the mean loss of the last tenth (nats/token)."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, settings.steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (settings.steps - step) / (settings.steps - warmup)),
    )
    tokens_per_step = settings.batch * settings.length
    needed = settings.steps * tokens_per_step
    if len(stream) < needed:
        raise ValueError(f"pretraining text has {len(stream)} tokens, {needed} are needed: raise `documents`")
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(stream[:needed].view(settings.steps, settings.batch, settings.length)):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, settings.steps // 8) == 0:
            speed = (step + 1) * tokens_per_step / (time.monotonic() - started)
            print(
                f"backbone step {step + 1}/{settings.steps}  loss {losses[-1]:.3f}  {speed:,.0f} tokens/s", flush=True
            )
    return sum(losses[-(settings.steps // 10) :]) / (settings.steps // 10)
