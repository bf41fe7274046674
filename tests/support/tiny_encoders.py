"""Encoders of a few thousand parameters with a tokenizer that joins pairs, and labelled rows to tune them on."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from dora_dist.adapter.model import DynamicLoraModel
from support import tiny_run

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
WORDS = [f"w{number}" for number in range(40)] + ['"', "entailment"]
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, type[PreTrainedConfig]] = {"bert": BertConfig, "roberta": RobertaConfig, "llama": LlamaConfig}


def encoder_config(architecture: str = "bert", **changes: Any) -> PreTrainedConfig:
    return ARCHITECTURES[architecture](**{**SIZES, **changes})


def tiny_classifier(architecture: str = "bert", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model with a head for three classes, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = encoder_config(architecture, **{"num_labels": 3, **changes})
        return AutoModelForSequenceClassification.from_config(config).eval()


def tiny_reader(architecture: str = "bert", **changes: Any) -> PreTrainedModel:
    """A random model with a head for the start and the end of an answer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForQuestionAnswering.from_config(encoder_config(architecture, **changes)).eval()


def tiny_summarizer(architecture: str = "bart", **changes: Any) -> PreTrainedModel:
    """A random encoder with a decoder, whose output depends on its input, the same each time."""
    common = {"vocab_size": SIZES["vocab_size"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"decoder_start_token_id": 2}
    if architecture == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        config: PreTrainedConfig = T5Config(**{**common, **sizes, **changes})
    else:
        sides = ("encoder", "decoder")
        sizes = {"d_model": 32, "max_position_embeddings": 64, "dropout": 0.0}
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64)):
            sizes |= {f"{side}_{name}": size for side in sides}
        config = BartConfig(**{**common, **sizes, "forced_bos_token_id": 1, "forced_eos_token_id": 2, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
    return model


def save_tiny_summarizer(folder: Path, architecture: str = "bart", **changes: Any) -> Path:
    tiny_summarizer(architecture, **changes).save_pretrained(folder)
    pair_tokenizer(eos_token="</s>").save_pretrained(folder)
    return folder


def save_tiny_encoder(folder: Path, architecture: str = "bert", **changes: Any) -> Path:
    """Save a random encoder without a head, with its tokenizer, in the ordinary layout; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(encoder_config(architecture, **changes))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                nn.init.normal_(parameter, std=0.2)  # at transformers' initial size the output hardly depends on input
    model.save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    return folder


def pair_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """One token a word; ``<s> A </s>``, and ``<s> A </s> B </s>`` with type 1 for the second sentence."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{
            "cls_token": "<s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            **special,
        },
    )


def write_pairs(path: Path, count: int, seed: int, numbers: bool = False) -> Path:
    """Write a table like GLUE's: unquoted, with quotation marks in some fields. The label says whether both sentences
    begin alike; with ``numbers`` it is the number of words that they share."""
    source = random.Random(seed)
    lines = ["index\tsentence1\tsentence2\tlabel"]
    for number in range(count):
        first = [f"w{source.randrange(8)}" for _ in range(source.randint(2, 7))]
        second = [first[0] if source.random() < 0.5 else f"w{source.randrange(8)}", f"w{source.randrange(8)}"]
        label = len(set(first) & set(second)) / 2 if numbers else "same" if first[0] == second[0] else "not_same"
        quote = '" ' if number % 3 == 0 else ""
        lines.append(f"{number}\t{quote}{' '.join(first)}\t{' '.join(second)}\t{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_classification(folder: Path, numbers: bool = False, **sections: Any) -> Path:
    """Model, tables and configuration of a run of 12 steps of 8 pairs in ``folder``."""
    save_tiny_encoder(folder / "model")
    tables = {
        part: {"path": str(write_pairs(folder / f"{part}.tsv", count, seed, numbers)), "quotes": False}
        for part, count, seed in (("train", 60, 1), ("eval", 21, 2))
    }
    data = {**tables, "labels": "regression" if numbers else "classes"}
    return write_task_run(folder, "sequence_classification", data, **sections)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_questions(folder: Path, unanswerable: bool = False, **sections: Any) -> Path:
    """Like :func:`write_classification`, for questions: the answer is what follows the word asked for; some contexts
    are longer than a window of 24 tokens."""
    save_tiny_encoder(folder / "model")
    data: dict[str, Any] = {"max_length": 24, "stride": 6}
    for part, count, seed in (("train", 30, 1), ("eval", 9, 2)):
        source = random.Random(seed)
        rows = []
        for number in range(count):
            words = [f"w{source.randrange(4, 40)}" for _ in range(source.randint(8, 30))]
            place = source.randrange(len(words) - 1)
            words[place] = "w0"
            context, answer = " ".join(words), words[place + 1]
            start = len(" ".join(words[: place + 1])) + 1
            has_none = unanswerable and number % 3 == 0
            answers = {"text": [] if has_none else [answer], "answer_start": [] if has_none else [start]}
            rows.append({"question": "w1" if has_none else "w0", "context": context, "answers": answers})
        data[part] = write_rows(folder / f"{part}.jsonl", rows)
    return write_task_run(folder, "question_answering", data, **sections)


def write_summaries(folder: Path, architecture: str = "bart", **sections: Any) -> Path:
    """Like :func:`write_classification`, for documents; a summary is the word w0 and the document's first words."""
    save_tiny_summarizer(folder / "model", architecture)
    data: dict[str, Any] = {"max_length": 40, "max_target_length": 12}
    for part, count, seed in (("train", 40, 1), ("eval", 9, 2)):
        source = random.Random(seed)
        texts = [[f"w{source.randrange(40)}" for _ in range(source.randint(3, 20))] for _ in range(count)]
        rows = [{"document": " ".join(text), "summary": " ".join(["w0", *text[: len(text) % 3]])} for text in texts]
        data[part] = write_rows(folder / f"{part}.jsonl", rows)
    evaluation = {"max_new_tokens": 8, **sections.pop("evaluation", {})}
    return write_task_run(folder, "seq2seq", data, evaluation=evaluation, **sections)


def write_task_run(folder: Path, task: str, data: dict[str, Any], **sections: Any) -> Path:
    """Like :func:`tiny_run.write_run`, for a task and a model that is not quantized."""
    own = {"task": task, "model": {"quantization": "none"}, "data": data}
    return tiny_run.write_run(folder, {**own, "training": {"per_device_eval_batch_size": 4}}, sections)


@torch.no_grad()
def shake_head(model: DynamicLoraModel, seed: int = 1) -> DynamicLoraModel:
    """Give the head other values than those that it started with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.head_parameters().values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def label_logits(model: nn.Module) -> torch.Tensor:
    """Logits of three rows of which two are padded, with two sentences each where the model tells them apart."""
    ids = torch.randint(5, SIZES["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [9]])).long()
    types = {}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        types["token_type_ids"] = (torch.arange(12) >= 5).long().expand(3, -1)
    return model(input_ids=ids * mask, attention_mask=mask, **types).logits
