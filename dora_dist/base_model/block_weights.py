"""The weights of a model's blocks: which are quantized, which are adapted, and which are neither.

Block weights are the matrices (and stacks of them) in the numbered blocks of a model.
"""

from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dora_dist.base_model.head import belongs_to, head_modules
from dora_dist.base_model.quantization import stays_in_16_bits
from dora_dist.base_model.shape import text_decoder
from dora_dist.config.adapter import ALL_LINEAR, UNIFORM, DynamicLoraConfig
from dora_dist.method.layer_names import split_name, without_numbers

MOST_UNQUANTIZED = 0.2
"""Share of the block weights that may stay in 16 bits under quantization."""


def _block_weights(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Full name and number of elements of every block weight of a model that is not quantized."""
    heads = head_modules(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or belongs_to(name, heads):
            continue
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and split_name(name).block and not part.endswith("bias"):
                yield f"{name}.{part}", parameter.numel()


def left_out(model: nn.Module, adapted: Collection[str]) -> dict[str, float]:
    """Kind of weight -> its share of the block weights, largest first, for all that belong to no adapted layer.

    A kind is a name with ``*`` for its numbers. Each part beside the text decoder, such as a vision tower, is one kind.

    Args:
        model: the model; may be on the meta device.
        adapted: full names of the adapted layers.
    """
    decoder = text_decoder(model)
    beside = decoder.rpartition(".")[0]
    kinds: Counter[str] = Counter()
    total = 0
    for name, size in _block_weights(model):
        total += size
        if name.rpartition(".")[0] not in adapted:
            kind = without_numbers(name).removesuffix(".weight")
            if decoder and not belongs_to(name, [decoder]):
                start = len(beside) + 1 if belongs_to(name, [beside]) else 0
                kind = name[: start + name[start:].find(".")]
            kinds[kind] += size
    return {kind: size / total for kind, size in kinds.most_common()}


def describe_left_out(model: nn.Module, adapter: DynamicLoraConfig, adapted: Collection[str]) -> str | None:
    """What ``all-linear`` leaves out, in words; None if it leaves out nothing, or if the layers were named."""
    given = adapter.target_modules == ALL_LINEAR and adapter.ranks == UNIFORM
    shares = left_out(model, adapted) if given else {}
    if not shares:
        return None
    listed = ", ".join(f"{kind} {_percent(share)}" for kind, share in shares.items())
    return f"all-linear leaves out {_percent(sum(shares.values()))} of the block weights: {listed}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def check_quantized(model: PreTrainedModel, quantization: str, allow_unquantized: bool) -> None:
    """Refuse to quantize a model if quantization would leave many of its weights as they are.

    bitsandbytes quantizes only layers of exactly the class ``torch.nn.Linear``, and transformers' ``Conv1D``. Experts
    that are one stacked parameter, and linear layers of other classes, stay in 16 bits.

    Args:
        model: the model, without weights.
        quantization: ``model.quantization`` of the configuration.
        allow_unquantized: ``model.allow_unquantized`` of the configuration.

    Raises:
        ValueError: too many would stay; the message names their share and the largest kinds.
    """
    if quantization == "none" or allow_unquantized:
        return
    quantized = {
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and not stays_in_16_bits(model, name)
    }
    kept = left_out(model, quantized)
    share = sum(kept.values())
    if share > MOST_UNQUANTIZED:
        largest = ", ".join(f"{kind} {_percent(part)}" for kind, part in list(kept.items())[:3])
        raise ValueError(
            f"model.quantization is {quantization}, but {_percent(share)} of the block weights would stay in 16 bits "
            f"(bitsandbytes quantizes linear layers only): {largest}. At most {MOST_UNQUANTIZED:.0%} may: set "
            "model.allow_unquantized to true if there is memory for them (dora-dist estimate counts them)"
        )
