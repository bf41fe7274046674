"""TRL's SFTTrainer with adaptive rank on a 4-bit base, on a CPU or GPUs; docs/trainers.md explains it.

pip install "dora-dist[trl]"
python examples/sft_trainer.py OUTPUT                        # a random tiny base and generated rows
python examples/sft_trainer.py OUTPUT --model MODEL          # your own base, on the same rows
accelerate launch --num_processes 8 examples/sft_trainer.py OUTPUT --model MODEL
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dora_dist import DynamicLoraConfig, DynamicRankCallback, PruningConfig, add_dynamic_lora

try:
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    raise SystemExit(f'error: this example needs TRL ({error}): pip install "dora-dist[trl]"') from None

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "copy", ":", *(f"w{number}" for number in range(40))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="folder or name of the base; by default a random tiny one is made")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--importance", default="frobenius", help="see PruningConfig")
    parser.add_argument("--init", choices=["inputs", "gradient"], help="start from the training rows")
    parser.add_argument("--resume", type=Path, help="a checkpoint in OUTPUT to go on from")
    options = parser.parse_args()

    # First, since they join the other processes, and know this one's device.
    arguments = SFTConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2 if options.model is None else 2e-4,
        logging_steps=10,
        save_steps=options.steps // 4,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    path = options.model or options.output / "base"
    with arguments.main_process_first(local=False):
        if options.model is None and arguments.process_index == 0:
            make_tiny_base(path)
    model = add_dynamic_lora(load_base(path, arguments.device), DynamicLoraConfig(target_rank=4, alpha=8.0))
    callback = DynamicRankCallback(PruningConfig(importance=options.importance), init=options.init)
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=copying_rows(200),
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=options.resume and str(options.resume))
    trainer.save_model(str(options.output / "adapter"))

    if trainer.is_world_process_zero():
        print("components of each layer:", callback.controller.ranks)
        PeftModel.from_pretrained(load_base(path, arguments.device), options.output / "adapter")  # stock PEFT reads it
        print("adapter:", options.output / "adapter")


def load_base(path: str | Path, device: torch.device) -> AutoModelForCausalLM:
    """In NF4, on this process's device: transformers by itself would put it on the current one."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4, dtype=dtype, device_map={"": device})


def make_tiny_base(folder: Path) -> None:
    """A random Llama of two blocks and a tokenizer of one token a word."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def copying_rows(count: int) -> Dataset:
    """Prompts with a few words, which the completion repeats."""
    source = random.Random(0)
    texts = [" ".join(f"w{source.randrange(40)}" for _ in range(source.randint(2, 6))) for _ in range(count)]
    return Dataset.from_list([{"prompt": f"copy : {text} :", "completion": f" {text}"} for text in texts])


if __name__ == "__main__":
    main()
