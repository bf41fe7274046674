"""How many layers a run computes again in the backward."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from dora_dist.base_model.recomputation import (
    Recomputation,
    number_of_recomputed,
    recomputable_layers,
    recompute_first,
)
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.config.training import recomputes_layers
from dora_dist.console.text import format_bytes
from dora_dist.data.prepared import PreparedSource
from dora_dist.distributed.agreement import Agreement
from dora_dist.memory.estimate import LEFT_FREE, card_bytes, estimate_memory
from dora_dist.setup.run_data import RunData


def smallest_card(agreement: Agreement) -> int | None:
    """Bytes of the smallest GPU of all ranks, the same number on each of them; None where a rank has none."""
    cards = agreement.gather(card_bytes(agreement.device))
    return None if None in cards else min(cards)


def resolve_recomputation(
    config: RunConfig, skeleton: PreTrainedModel, data: RunData, world_size: int, card: int | None
) -> tuple[Recomputation, list[str]]:
    """Decide for ``model.recompute_layers``.

    Args:
        config: the run's configuration.
        skeleton: the model without weights.
        data: all sources.
        world_size: number of ranks of the run.
        card: bytes of the smallest GPU of the run; None where a rank has none.

    Returns:
        The layers that are recomputed, and what a user should know of how ``auto`` has been decided.

    Raises:
        ValueError: the model has fewer layers, or none that can be recomputed one by one.
    """
    setting, layers = config.model.recompute_layers, recomputable_layers(skeleton)
    if setting is None:
        return Recomputation(len(layers) * recomputes_layers(config.training), len(layers)), []
    if setting != "auto":
        return Recomputation(number_of_recomputed(setting, layers, config.model.path), len(layers)), []
    everything = Recomputation(number_of_recomputed("all", layers, config.model.path), len(layers))
    if card is None or config.task != CAUSAL_LM:
        return everything, []
    estimate = estimate_memory(with_longest_row(config, data.train), world_size, "cuda", card)
    if estimate.configured.approximate or estimate.recomputation.layers != len(layers):
        return everything, []
    remarks = []
    if estimate.peak_bytes > (1 - LEFT_FREE) * card:
        remarks.append(
            f"warning: by dora-dist estimate a step takes {format_bytes(estimate.peak_bytes)} though all layers are "
            f"recomputed, which leaves less than {LEFT_FREE:.0%} of the {format_bytes(card)} of the smallest GPU free: "
            "if memory runs out, lower training.per_device_train_batch_size or data.max_length"
        )
    return estimate.recomputation, remarks


def apply_recomputation(config: RunConfig, base: PreTrainedModel, recomputation: Recomputation) -> None:
    """Let a base compute again what has been decided; where ``training`` says it, that is left to the Trainer."""
    if config.model.recompute_layers is not None:
        recompute_first(base, recomputation.count)


def with_longest_row(config: RunConfig, sources: Sequence[PreparedSource]) -> RunConfig:
    """The configuration with the longest row that there is as ``data.max_length``, for an estimate of memory; packed
    rows are all as long as can be."""
    if config.data.batching == "packed":
        return config
    longest = max(int(source.lengths().max()) for source in sources)
    return replace(config, data=replace(config.data, max_length=longest))
