"""What a model writes, by the settings of a run alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
"""The fields that are taken from a model's own ``generation_config.json``."""


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
    """Leave the model its special tokens only. Its settings are back afterwards, since an export writes them."""
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    settings = base.generation_config
    base.generation_config = GenerationConfig(**{name: getattr(settings, name, None) for name in SPECIAL_TOKENS})
    try:
        yield
    finally:
        base.generation_config = settings
