"""Distributed training of dynamic-rank LoRA adapters (Dynamic Low-Rank Adaptation, Mao et al., ACL 2024)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_dist.adapter.model import add_dynamic_lora as add_dynamic_lora
    from dora_dist.config.adapter import DynamicLoraConfig as DynamicLoraConfig
    from dora_dist.config.pruning import PruningConfig as PruningConfig
    from dora_dist.routing.loading import load_adapter as load_adapter
    from dora_dist.routing.model import add_routed_lora as add_routed_lora
    from dora_dist.stock_trainer.callback import DynamicRankCallback as DynamicRankCallback

__version__ = "0.1.0"
__all__ = [
    "DynamicLoraConfig",
    "DynamicRankCallback",
    "PruningConfig",
    "add_dynamic_lora",
    "add_routed_lora",
    "load_adapter",
]
_HOME = {
    "DynamicLoraConfig": "dora_dist.config.adapter",
    "DynamicRankCallback": "dora_dist.stock_trainer.callback",
    "PruningConfig": "dora_dist.config.pruning",
    "add_dynamic_lora": "dora_dist.adapter.model",
    "add_routed_lora": "dora_dist.routing.model",
    "load_adapter": "dora_dist.routing.loading",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `python -m dora_dist.x --help` and the pure modules do not wait for peft and transformers.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
