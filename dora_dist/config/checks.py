"""Checks of single configuration values, with their error messages."""

import difflib
from collections.abc import Iterable, Sequence
from types import NoneType

KINDS: dict[type, str] = {
    **{str: "text", int: "a whole number", float: "a number", bool: "true or false"},
    **{dict: "a mapping", list: "a list", NoneType: "null"},
}
"""Types of values, in words."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?``, or an empty string where no known name is close."""
    known = sorted(known)
    # The right key in the wrong section comes before a similar key.
    near = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


ELSEWHERE = {
    "preset": ("finetuning_type", "use_peft"),
    "adapter.target_rank": ("r", "lora_r", "lora_rank", "rank"),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.target_modules": ("lora_target", "lora_target_modules", "lora_target_linear"),
    "adapter.scale": ("use_rslora", "peft_use_rslora"),
    "adapter.init": ("init_lora_weights", "peft_init_lora_weights", "pissa_init"),
    "adapter.start_from": ("from", "adapter_name_or_path", "lora_model_dir", "adapter_path"),
    "adapter.new_tokens": ("tokens", "add_tokens", "resize_vocab"),
    "data.train": ("dataset", "datasets", "dataset_name", "dataset_dir", "data_path", "train_file", "train_data"),
    "data.eval": (
        *("eval_dataset", "validation_file", "val_file", "val_data"),
        *("test_datasets", "dataset_test_split", "val_size", "val_set_size"),
    ),
    "data.format": ("formatting", "type"),
    "data.max_length": ("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "model_max_length"),
    "data.overlong": ("excess_length_strategy",),
    "data.chat_template": ("template", "prompt_template", "chat_template_path"),
    "data.batching": ("packing", "sample_packing", "neat_packing"),
    "data.chat_template_kwargs": ("template_kwargs", "enable_thinking"),
    "data.system": ("default_system", "default_system_message"),
    "data.train_on": (
        *("train_on_inputs", "train_on_prompt", "mask_history", "roles_to_train"),
        *("assistant_only_loss", "completion_only_loss"),
    ),
    "data.workers": ("preprocessing_num_workers", "dataset_num_proc"),
    "data.cache_dir": ("tokenized_path", "dataset_prepared_path"),
    "model.path": ("model_name_or_path", "name_or_path", "base_model", "model_name", "model_id"),
    "model.quantization": ("load_in_4bit", "load_in_8bit", "quantization_bit"),
    "model.compute_dtype": ("dtype", "torch_dtype"),
    "model.attention": ("attn_implementation", "flash_attn", "flash_attention"),
    "model.recompute_layers": (
        "activation_checkpointing",
        "gradient_checkpointing",
        "disable_gradient_checkpointing",
    ),
    "training.learning_rate": ("lr",),
    "training.lr_scheduler_type": ("lr_scheduler",),
    "training.warmup_steps": ("warmup_ratio",),
    "training.optim": ("optimizer",),
    "training.lora_plus_ratio": ("loraplus_lr_ratio",),
    "training.per_device_train_batch_size": ("batch_size", "micro_batch_size"),
    "training.num_train_epochs": ("num_epochs", "epochs"),
    "training.report_to": ("use_wandb", "wandb_project"),
    "checkpoint.resume": ("auto_resume_from_checkpoints",),
    "evaluation.early_stopping": ("early_stopping_steps", "early_stopping_patience"),
}
"""Key of this program -> its names in other trainers."""


def of_other_trainers(name: str) -> str:
    """``; here it is X`` if other trainers use this name for key X, otherwise an empty string."""
    last = name.rsplit(".", 1)[-1]
    return next((f"; here it is {key}" for key, names in ELSEWHERE.items() if last in names), "")


def alternatives(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise a ``ValueError`` with name, value and rule if the rule does not hold."""
    if not holds:
        raise ValueError(f"{name} is {value}, but must {rule}")
