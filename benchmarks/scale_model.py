"""Cost of agreement between ranks, as arithmetic: bytes and seconds from shapes, a network and measured constants.

Everything here is a plain function of plain numbers; ``agreement_scale.py`` measures the constants. Formulas, sources
and assumptions: ``docs/scale.md``. Seconds and bytes throughout; n is the number of ranks.
"""

import math
from dataclasses import dataclass

OBJECT_BYTES = {"failure": 4, "digest": 47}
"""Bytes of ``None`` and of 32 bytes as Python pickles them (protocol 4), which is what travels."""
SIZE_BYTES = 8
"""Bytes of the length that every rank announces before its object."""
FLOAT64 = 8
SMALLEST_ELEMENT = 4
"""Bytes of the flag that is reduced in every step."""
CHECKPOINT_PHASES = 4
"""Phases of a checkpoint that all ranks leave together (``Checkpointer.save``)."""
DIGESTED_TENSORS = 4
"""Number of tensors of a layer that are digested: A, gate, B and mask, each copied to the host by itself."""
SYNCS_PER_LAYER = 6
"""Number of times a layer that an event makes the host wait for the device elsewhere, by reading the code: whether
scores are finite (twice), their copies for the selection (twice), and the mask that is written from a list (twice)."""


@dataclass(frozen=True)
class Shape:
    """A Llama model: seven adapted linear layers a block.

    Args:
        name: name of the model.
        blocks: number of decoder layers.
        hidden, intermediate, key_value: widths.
        vocabulary: number of tokens; input embedding and output head are two matrices.
    """

    name: str
    blocks: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int = 128256

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the adapted layers of one block."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def layers(self) -> int:
        """Number of adapted layers of the model."""
        return self.blocks * len(self.linears)

    def adapter_numel(self, rank: int) -> int:
        """Number of trained elements: A, B and gates."""
        return self.blocks * sum(rank * (a + b + 1) for a, b in self.linears)

    @property
    def base_numel(self) -> int:
        """Number of elements of the frozen base, without norms."""
        return self.blocks * sum(a * b for a, b in self.linears) + 2 * self.vocabulary * self.hidden


LLAMA_8B = Shape("8B", 32, 4096, 14336, 1024)
LLAMA_70B = Shape("70B", 80, 8192, 28672, 1024)
LLAMA_405B = Shape("405B", 126, 16384, 53248, 1024)
SHAPES = (LLAMA_8B, LLAMA_70B, LLAMA_405B)


@dataclass(frozen=True)
class Network:
    """The properties of a network on which the cost of messages depends.

    Args:
        name: name of the network, for tables.
        latency: seconds of one message between neighbours; of a round, in which all ranks send at the same time.
        bandwidth: bytes per second of one rank.
        tree: whether all-reduces go over trees, in 2 log2(n) rounds, instead of a ring.
        launch: seconds of starting one collective and waiting for it.
        shared: whether all ranks share a few cores (local measurements), so that their messages take turns: what counts
            are the messages and bytes of all ranks together, and ``latency`` and ``bandwidth`` are those of the
            machine.
    """

    name: str
    latency: float
    bandwidth: float
    tree: bool = False
    launch: float = 0.0
    shared: bool = False

    def gather(self, n: int, nbytes: float) -> float:
        """All-gather of ``nbytes`` a rank: a ring, n - 1 rounds, in each of which one rank's block moves on."""
        # gloo sends every block in two halves, one behind the other.
        messages, moved = (2 * n * (n - 1), n * (n - 1) * nbytes) if self.shared else (n - 1, (n - 1) * nbytes)
        return self._seconds(messages, moved)

    def reduce(self, n: int, nbytes: float) -> float:
        """All-reduce: a ring of 2 (n - 1) rounds with an n-th each, or up and down a tree with all of it."""
        if n == 1:
            return self.launch
        if self.tree:
            return self._seconds(2 * math.ceil(math.log2(n)), 2 * nbytes)
        rounds, moved = 2 * (n - 1), 2 * (n - 1) * nbytes
        if self.shared:
            # gloo cuts the data into two segments a rank, and does not send empty ones.
            return self._seconds(rounds * min(2 * n, max(1, nbytes // SMALLEST_ELEMENT)), moved)
        return self._seconds(rounds, moved / n)

    def _seconds(self, messages: float, moved: float) -> float:
        return self.launch + messages * self.latency + moved / self.bandwidth


@dataclass(frozen=True)
class Rank:
    """Costs of what a rank does by itself.

    Args:
        hash_rate: bytes per second of SHA-256 as ``digest_tensors`` does it, copy included.
        copy_rate: bytes per second from device to host; infinite where the adapter is in host memory.
        sync: seconds of one such copy, however small: the host waits for the device.
        object_fixed: seconds of packing and unpacking in one object gather.
        object_per_rank: the same, for every rank whose object arrives.
        select_per_component: seconds of the selection.
        apply_per_layer: seconds of zeroing gates.
    """

    hash_rate: float
    copy_rate: float
    sync: float
    object_fixed: float
    object_per_rank: float
    select_per_component: float
    apply_per_layer: float


def object_gather(n: int, nbytes: float, network: Network, rank: Rank) -> float:
    """``Agreement.gather``: sizes, then objects padded to the largest, then one unpickling a rank."""
    wire = network.gather(n, SIZE_BYTES) + network.gather(n, nbytes)
    return wire + rank.object_fixed + n * rank.object_per_rank


def object_gather_bytes(n: int, nbytes: int) -> int:
    """Bytes that one rank receives in an object gather."""
    return (n - 1) * (SIZE_BYTES + nbytes)


def verify_seconds(shape: Shape, r0: int, element_bytes: int, n: int, network: Network, rank: Rank) -> dict[str, float]:
    """``DynamicRankController.verify`` by part: every rank digests its whole adapter, then 32 bytes are gathered."""
    nbytes = shape.adapter_numel(r0) * element_bytes
    tensors = DIGESTED_TENSORS * shape.layers
    return {
        "copy to host": nbytes / rank.copy_rate + tensors * rank.sync,
        "hash": nbytes / rank.hash_rate,
        "gather of digests": object_gather(n, OBJECT_BYTES["digest"], network, rank),
    }


def event_seconds(shape: Shape, r0: int, element_bytes: int, n: int, network: Network, rank: Rank) -> dict[str, float]:
    """A pruning event by part, as ``DynamicRankController.after_optimizer_step`` runs it."""
    components = r0 * shape.layers
    return {
        "gather of failures": object_gather(n, OBJECT_BYTES["failure"], network, rank),
        **verify_seconds(shape, r0, element_bytes, n, network, rank),
        "mean of scores": network.reduce(n, FLOAT64 * components),
        "selection": components * rank.select_per_component
        + shape.layers * (rank.apply_per_layer + SYNCS_PER_LAYER * rank.sync),
    }


def event_bytes(shape: Shape, r0: int, n: int) -> int:
    """Bytes that one rank receives at an event."""
    reduced = round(2 * (n - 1) / n * FLOAT64 * r0 * shape.layers)
    return sum(object_gather_bytes(n, size) for size in OBJECT_BYTES.values()) + reduced


def step_seconds(n: int, network: Network) -> float:
    """Seconds that every optimizer step spends on the question whether any rank was told to stop."""
    return network.reduce(n, 4)


@dataclass(frozen=True)
class Files:
    """Sizes, in bytes, of what is read when many ranks start.

    Args:
        base: size of the model's weights as stored.
        adapter: size of ``dynamic_lora.safetensors``.
        optimizer: size of all ``optimizer/rank-*.safetensors`` together.
    """

    base: int
    adapter: int
    optimizer: int


def checkpoint_files(shape: Shape, r0: int, element_bytes: int, weight_bytes: float = 2) -> Files:
    """Sizes of a checkpoint; the optimizer keeps a float32 master copy and two moments of every trained element."""
    trained, components = shape.adapter_numel(r0), r0 * shape.layers
    return Files(
        base=round(shape.base_numel * weight_bytes),
        adapter=trained * element_bytes + components * (1 + FLOAT64),
        optimizer=12 * trained,
    )


def checkpoint_seconds(
    shape: Shape, r0: int, element_bytes: int, n: int, network: Network, rank: Rank
) -> dict[str, float]:
    """Seconds of agreeing on a checkpoint and of sealing it, by part, without writing it."""
    files = checkpoint_files(shape, r0, element_bytes)
    # The adapter is in the checkpoint twice: as it is, and folded for PEFT (of full rank until the final event).
    sealed = 2 * files.adapter + files.optimizer
    return {
        "digests compared": sum(verify_seconds(shape, r0, element_bytes, n, network, rank).values()),
        "phases left together": CHECKPOINT_PHASES * object_gather(n, OBJECT_BYTES["failure"], network, rank),
        "manifest by rank 0": sealed / rank.hash_rate,
    }


def resume_seconds(files: Files, n: int, shared_rate: float, client_rate: float, hash_rate: float) -> dict[str, float]:
    """Seconds in which all ranks read a checkpoint, by part.

    Args:
        files: sizes of the files.
        n: number of ranks, as many as have written the checkpoint.
        shared_rate: bytes per second of the file system, all readers together.
        client_rate: bytes per second of one reader.
        hash_rate: bytes per second of SHA-256.
    """
    everything = files.adapter + files.optimizer
    per_rank = files.adapter + files.optimizer / n
    return {
        # Reading and hashing one file after the other, in one thread; the other ranks wait.
        "manifest check by rank 0": everything / min(client_rate, shared_rate) + everything / hash_rate,
        "adapter and optimizer parts": max(per_rank / client_rate, n * per_rank / shared_rate),
    }


def base_seconds(files: Files, readers: int, shared_rate: float, client_rate: float) -> float:
    """Seconds of reading the frozen base ``readers`` times from one file system."""
    return max(files.base / client_rate, readers * files.base / shared_rate)
