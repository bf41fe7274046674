"""The quickstart's backbone: a sentencepiece tokenizer and a small LLaMA, saved in Hugging Face's layout.

torch, transformers and sentencepiece are imported inside the functions, because a cached quickstart must not wait for
them.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.console.files import follow_umask
from dora_dist.console.text import say

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, LlamaTokenizer

PROGRESS_SECONDS = 8.0
"""Time between two lines of the pretraining."""
UNKNOWN_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3


@dataclass(frozen=True)
class BackboneSettings:
    """Sizes of the model and of its pretraining: `steps` optimizer steps of `batch` documents each."""

    vocabulary: int = 1024
    hidden: int = 128
    intermediate: int = 256
    layers: int = 5
    heads: int = 4
    positions: int = 256
    initial_embedding_std: float = 0.05
    batch: int = 12
    steps: int = 560
    warmup_steps: int = 30
    learning_rate: float = 2e-3


def train_tokenizer(documents: Iterable[str], folder: Path, vocabulary: int) -> "LlamaTokenizer":
    """Train a byte-fallback BPE model like LLaMA's, write it to the new `folder`, and wrap it.

    Line breaks are not in the vocabulary, as in LLaMA: they are the byte token <0x0A>. The wrapped tokenizer
    prepends bos and never appends eos. `folder` must not exist: transformers would prefer a tokenizer.json
    that is left in it.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True)
    model_file = folder / "tokenizer.model"
    with open(model_file, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            # "|" stands for a line break, which splits words like any other character that is not a letter. A
            # word that starts a line thus gets a piece without the word mark, and the line break itself gets no
            # piece.
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
    # Despite its documentation, transformers 5.23 does not add bos to a bare sentencepiece model unless told.
    tokenizer: LlamaTokenizer = LlamaTokenizer.from_pretrained(folder, pad_token="<pad>", add_bos_token=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode_documents(documents: Sequence[str], model_file: Path) -> list[list[int]]:
    """Return the token ids of every document: bos, pieces, eos."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    encoded: list[list[int]] = processor.encode(list(documents), add_bos=True, add_eos=True)
    return encoded


def padded_batches(encoded: Sequence[list[int]], batch: int) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Yield (input_ids, labels), each (batch, longest), of whole documents; padding is right, its label -100.

    Documents are not packed into one stream: chunks of 64 tokens lose the lines that a document repeats.
    After 200 steps (mean loss of the last 50) packing had reached 1.47 nats/token, whole documents 0.95.
    """
    import torch

    for start in range(0, len(encoded) - batch + 1, batch):
        rows = encoded[start : start + batch]
        longest = max(len(row) for row in rows)
        input_ids = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])
        yield input_ids, input_ids.masked_fill(input_ids == PAD_ID, -100)


def build_model(settings: BackboneSettings, vocabulary: int, seed: int) -> "LlamaForCausalLM":
    """Return an untrained LLaMA; all sides of its linear layers are multiples of 64, the block of NF4."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=settings.initial_embedding_std)
    # The head starts as the embedding and is then trained separately. Copying a word is then the same linear map
    # for all words from the start; from independent starts, each word would have to be learned by itself. On an
    # earlier text, loss after 200 steps: 0.98 with this, 1.24 without (one seed).
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    return model


def pretrain(model: "LlamaForCausalLM", encoded: Sequence[list[int]], settings: BackboneSettings) -> float:
    """Train `model` in place, one pass over `encoded`; return the last tenth's mean loss (nats/token)."""
    import torch

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    decay_steps = settings.steps - settings.warmup_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / settings.warmup_steps, (settings.steps - step) / decay_steps),
    )
    model.train()
    losses: list[float] = []
    num_tokens = 0
    started = last_said = time.monotonic()
    for step, (input_ids, labels) in enumerate(padded_batches(encoded, settings.batch), start=1):
        # No attention mask is needed: padding is on the right, where causal attention never looks.
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        num_tokens += input_ids.numel()
        now = time.monotonic()
        if now - last_said >= PROGRESS_SECONDS or step == settings.steps:
            last_said = now
            minutes_left = (settings.steps - step) * (now - started) / step / 60
            say(
                f"backbone: step {step:>{len(str(settings.steps))}}/{settings.steps}  loss {losses[-1]:.3f}  "
                f"{num_tokens / (now - started):,.0f} tokens/s  {minutes_left:.1f} min left"
            )
    last_tenth = losses[-(settings.steps // 10) :]
    return sum(last_tenth) / len(last_tenth)


def create_backbone(
    documents: Sequence[str], prompts: Sequence[str], folder: Path, settings: BackboneSettings, seed: int
) -> None:
    """Train the tokenizer on documents and prompts, the model on documents; save both to a new `folder`."""
    from transformers.utils.logging import disable_progress_bar

    tokenizer = train_tokenizer([*documents[:2000], *prompts], folder, settings.vocabulary)
    model = build_model(settings, len(tokenizer), seed)
    say(f"backbone: {model.num_parameters():,} parameters, {len(tokenizer)} pieces")
    loss = pretrain(model, encode_documents(documents, folder / "tokenizer.model"), settings)
    say(f"backbone: mean loss of the last tenth {loss:.3f} nats/token")
    disable_progress_bar()  # it is one small file
    model.save_pretrained(folder)
    follow_umask(folder)
