"""A base in shards on paper: memory per GPU, and what is gathered in a step, for Llama-3 shapes of 8B, 70B and 405B.

    python benchmarks/sharded_base.py             # prints the tables of docs/scale.md; nothing is run or measured

Memory is that of ``dora-dist estimate`` with ``configs/llama3-70b_dynamic-lora_sharded.yaml`` for each shape and number
of GPUs. What is gathered is arithmetic on shapes; rates and speeds are assumed, in the first lines below.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from dora_dist.base_model.load import BaseModelSpec, load_skeleton
from dora_dist.base_model.shape import ModelShape, read_shape
from dora_dist.config.parse import load_config
from dora_dist.console.text import GIB
from dora_dist.memory.estimate import MemoryEstimate, estimate_memory

RECIPE = Path(__file__).parents[1] / "configs" / "llama3-70b_dynamic-lora_sharded.yaml"
RANKS = (1, 2, 4, 8, 16, 32, 64)
NVLINK = 450e9
"""Bytes a second that a GPU receives: half of the 900 GB/s of an H100, which count both directions."""
NETWORK = 50e9
"""Bytes per second that a GPU receives over 400 Gb/s of its own."""
FLOPS = 200e12
"""Floating point operations per second of a GPU in a training step, as in benchmarks/agreement_scale.py. A token takes
``FLOPS_PER_WEIGHT`` for each weight: forward, the gradient of the input, and the forward again."""
FLOPS_PER_WEIGHT = 6
TOKENS = 8192
"""Number of tokens of a micro-batch on a GPU, by which gathering is compared with computing."""
GATHERS = 2
"""Number of gathers of every layer in a micro-batch: forward, and backward, in which a layer that is recomputed is
still there."""
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}


def save_shape(folder: Path, name: str) -> Path:
    """A model folder that has a configuration and no weights."""
    config = LlamaConfig(
        **SHAPES[name],
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder / name)
    return folder / name


def estimate(model: Path, ranks: int, *overrides: str) -> MemoryEstimate:
    """Memory of the recipe on this model and so many GPUs."""
    return estimate_memory(load_config(RECIPE, ["--model.path", str(model), *overrides]), ranks)


def layer_bytes(shape: ModelShape) -> int:
    """Bytes of the 4-bit codes of one decoder layer; constants, norms and biases are whole on every rank."""
    return sum(linear.numel for linear in shape.blocks[0].linears) // 2


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Cost of what one rank receives in a micro-batch.

    Attributes:
        nbytes: size of all layers, counted every time that they are gathered.
        nvlink: seconds over :data:`NVLINK`.
        network: seconds over :data:`NETWORK`.
        computing: seconds of a micro-batch of :data:`TOKENS` tokens at :data:`FLOPS`.
    """

    nbytes: float
    nvlink: float
    network: float
    computing: float

    @classmethod
    def of(cls, shape: ModelShape, ranks: int) -> "Gathered":
        """The cost for ``ranks`` ranks that share a base; a rank has its own shard already."""
        nbytes = GATHERS * layer_bytes(shape) * len(shape.blocks) * (ranks - 1) / ranks
        weights = sum(linear.numel for linear in shape.linears)
        computing = FLOPS_PER_WEIGHT * weights * TOKENS / FLOPS
        return cls(nbytes=nbytes, nvlink=nbytes / NVLINK, network=nbytes / NETWORK, computing=computing)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        models = {name: save_shape(Path(temporary), name) for name in SHAPES}
        print("| shape | " + " | ".join(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in RANKS) + " |")
        print("|---" * (len(RANKS) + 1) + "|")
        eight = {}
        for name, model in models.items():
            peaks = []
            for ranks in RANKS:
                found = estimate(model, ranks)
                eight |= {name: found} if ranks == 8 else {}
                peaks.append(f"{found.peak_bytes / GIB:.1f}")
            print(f"| {name} | " + " | ".join(peaks) + " |")
        print("\n| GiB on each of 8 GPUs | " + " | ".join(models) + " |\n" + "|---" * (len(models) + 1) + "|")
        parts = dict.fromkeys(part for found in eight.values() for part in found.configured.peak.parts)
        for part in parts:
            sizes = [found.configured.peak.parts.get(part, 0) / GIB for found in eight.values()]
            if max(sizes) >= 0.05:
                print(f"| {part} | " + " | ".join(f"{size:.1f}" for size in sizes) + " |")
        print("\n| shape | a layer, MB | received in a micro-batch, GB | NVLink, s | 400 Gb/s, s | computing, s |")
        print("|---" * 6 + "|")
        for name, model in models.items():
            shape = read_shape(load_skeleton(BaseModelSpec(path=str(model))), {})
            cost = Gathered.of(shape, 8)
            print(
                f"| {name} | {layer_bytes(shape) / 1e6:.0f} | {cost.nbytes / 1e9:.1f} | {cost.nvlink:.3f} | "
                f"{cost.network:.2f} | {cost.computing:.1f} |"
            )


if __name__ == "__main__":
    main()
