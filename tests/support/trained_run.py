"""The folder of a run that never ran: a tiny base with tokenizer, and an adapter of random values and uneven ranks."""

import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dora_dist.adapter.model import DynamicLoraModel, add_dynamic_lora
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.data import DataConfig
from dora_dist.config.model import ModelConfig
from dora_dist.config.parse import config_text, load_config
from dora_dist.config.run import RunConfig
from dora_dist.console import files
from dora_dist.export import __main__ as export
from dora_dist.runs import records
from dora_dist.runs.adapter_folder.use import Use
from support.tiny_models import load_base, shake, tiny_model
from support.tiny_run import some_fingerprint

VOCABULARY = 128
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
EMPTY_MODULE = "model.layers.1.self_attn.v_proj"
INITIAL_RANK = 6


@dataclass(frozen=True)
class TrainedFolder:
    """A run folder, its base, and the model it was written from."""

    folder: Path
    base: Path
    model: DynamicLoraModel

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model.eval()(input_ids=probe()).logits


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one thread: threads that wait for a busy core make bitsandbytes' loops over tiny tensors five times
    slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def probe() -> Tensor:
    return torch.arange(60).reshape(3, 20) * 7 % 100


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_base(folder: Path, architecture: str = "llama", **changes: object) -> Path:
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 128, "max_position_embeddings": 256, "use_cache": True}
    tiny_model(architecture, **{**sizes, **changes}).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def make_run(
    folder: Path,
    base: Path,
    quantization: str = "nf4",
    target_modules: str | list[str] = "all-linear",
    compute_dtype: str = "float32",
    change: Callable[[DynamicLoraModel], object] = lambda model: None,
    rope_scaling: dict[str, Any] | None = None,
) -> TrainedFolder:
    """Write ``config.yaml``, ``run.json`` and ``adapter/``; ``change`` may change the model before it is saved."""
    adapter = DynamicLoraConfig(target_rank=4, initial_rank=INITIAL_RANK, target_modules=target_modules)
    config = RunConfig(
        output_dir=str(folder),
        model=ModelConfig(path=str(base), quantization=quantization, rope_scaling=rope_scaling),
        adapter=adapter,
        data=DataConfig(train="nowhere.jsonl"),
    )
    dtype = getattr(torch, compute_dtype)
    model = add_dynamic_lora(load_base(base, quantization, dtype), adapter)
    shake(model)
    for number, (name, layer) in enumerate(model.adapted_layers().items()):
        kept = 0 if name == EMPTY_MODULE else 1 + number % INITIAL_RANK
        layer.component_mask.copy_(torch.arange(INITIAL_RANK).roll(number) < kept)
    change(model)
    folder.mkdir(parents=True)
    (folder / records.CONFIG).write_text(config_text(config))
    fingerprint = some_fingerprint(model={"path": str(base), "quantization": quantization, "compute_dtype": str(dtype)})
    files.write_json(folder / records.RUN, {"settings": fingerprint.as_dict()})
    save_adapter(model, folder / "adapter")
    return TrainedFolder(folder, base, model)


def save_adapter(model: DynamicLoraModel, folder: Path) -> None:
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def write_use(run: Path, adapter: Path) -> None:
    """Write into an adapter's folder how the adapter is used, from the records of its run."""
    Use.of(load_config(run / records.CONFIG), run).write(adapter)


def run_export(run: TrainedFolder, output: Path, *options: str) -> Path:
    """Export like the command; returns ``output``."""
    export.main([str(run.folder), "--output", str(output), *options])
    return output


def make_foreign(folder: Path, base: Path, **settings: object) -> Path:
    """An adapter of stock PEFT with random values, ``r == lora_alpha`` unless ``settings`` say otherwise, and what PEFT
    saves beside LoRA by them."""
    torch.manual_seed(0)
    chosen = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(load_base(base, "none"), LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder
