"""Gradient checkpointing outside of the Trainer, which switches it on itself."""

from typing import Any


def checkpoint_activations(model: Any) -> None:
    """Let a model of transformers, or of PEFT around it, compute its layers again in the backward while it is in
    training mode. The reentrant kind would cut the gradient at the frozen embedding."""
    # transformers before 5.23 has only the old name, which 5.23 deprecates and 6 is to remove.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
