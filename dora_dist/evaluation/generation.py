"""What a model writes, by the settings of a run alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
"""What is taken of a model's own settings of generation."""


def generate(model: Any, **options: Any) -> Tensor:
    """Token ids that a model writes, by transformers' ``generate`` with these options.

    Nothing else of the model's ``generation_config.json`` acts than its special tokens: transformers would take the
    model's penalties, shortest lengths, forced and suppressed tokens and beams for every option that is not given.

    Args:
        model: a base, or a module around one that has ``generate``.
        options: arguments of ``generate``.
    """
    with _special_tokens_alone(model):
        output: Tensor = model.generate(**options)
    return output


@contextmanager
def _special_tokens_alone(model: nn.Module) -> Iterator[None]:
    """The model has its own settings again afterwards, which an export writes."""
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    settings = base.generation_config
    base.generation_config = GenerationConfig(**{name: getattr(settings, name, None) for name in SPECIAL_TOKENS})
    try:
        yield
    finally:
        base.generation_config = settings
