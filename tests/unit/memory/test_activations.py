"""The arithmetic of memory, against the tensors of real models."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from support.repository import REPOSITORY
from support.tiny_models import adapt, load_base, save_stored, tiny_model, tokens, trainable
from torch import nn

from dora_dist.adapter.targets import resolve_targets
from dora_dist.base_model.load import BaseModelSpec, load_skeleton
from dora_dist.base_model.shape import read_shape
from dora_dist.memory.activations import Adapter, Batch, SideBySide, block_memory
from dora_dist.memory.step import (
    GATHERED_LAYERS,
    Optimizer,
    TrainingStep,
    base_parts,
    chunked_loss_memory,
    loss_memory,
    step_memory,
)


def shape_of(folder, targets="all-linear", fuse=True, rank=3):
    skeleton = load_skeleton(BaseModelSpec(path=str(folder)))
    return read_shape(skeleton, dict.fromkeys(resolve_targets(skeleton, targets), rank), fuse)


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model and give its folder."""

    def save(architecture="llama", **changes):
        tiny_model(architecture, **changes).save_pretrained(tmp_path)
        return tmp_path

    return save


def tensor_bytes(model):
    """Bytes of all tensors of a loaded base, by the same parts."""
    weights = constants = 0
    quantized = {}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            parts = (state.absmax, state.code)
            if state.nested:
                parts += (state.offset, state.state2.absmax, state.state2.code)
        elif isinstance(module, Linear8bitLt):
            parts = (module.weight.SCB,)
        else:
            continue
        quantized[id(module.weight)] = module.weight
        constants += sum(part.nbytes for part in parts)
    ends = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    others = {id(entry): entry for entry in (*model.parameters(), *model.buffers())}
    if not quantized:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        quantized = {id(module.weight): module.weight for module in linears if id(module.weight) not in ends}
    weights = sum(weight.nbytes for weight in quantized.values())
    rest = [entry for key, entry in others.items() if key not in quantized and key not in ends]
    return [weights, constants, sum(weight.nbytes for weight in ends.values()), sum(entry.nbytes for entry in rest)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_base_takes_just_the_bytes_of_its_tensors(saved, quantization, tied, dtype):
    # Sizes at which blocks of 64 weights, and of 256 constants, are not full.
    folder = saved(tie_word_embeddings=tied, hidden_size=68, intermediate_size=130, attention_bias=True)
    parts = base_parts(shape_of(folder), quantization, dtype.itemsize)
    assert list(parts.values()) == tensor_bytes(load_base(folder, quantization, dtype))
    assert ("4-bit weights" in parts) == (quantization == "nf4")


@pytest.mark.parametrize("double", [True, False])
def test_a_base_that_comes_in_4_bits_is_counted_as_it_is_stored(double, saved, tmp_path):
    base = saved(hidden_size=68, intermediate_size=130)
    folder = save_stored(tmp_path / "stored", base, bnb_4bit_use_double_quant=double)
    expected = tensor_bytes(load_base(folder))
    assert list(base_parts(shape_of(folder), "nf4", 4).values()) == expected
    assert (expected == tensor_bytes(load_base(base))) == double


def test_of_a_sharded_base_a_rank_has_its_part_of_the_layers_and_all_else(saved):
    folder = saved(num_hidden_layers=8)
    whole, sharded = (base_parts(shape_of(folder), "nf4", 4, shards) for shards in (1, 4))
    weights = whole.pop("4-bit weights")
    assert sharded.pop("4-bit weights, in 4 shards") == weights / 4
    assert sharded.pop("gathered layers") == weights * GATHERED_LAYERS / 8
    assert sharded == whole


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma"])
def test_other_architectures_are_read_off_their_modules(saved, architecture):
    folder = saved(architecture)
    shape = shape_of(folder)
    assert list(base_parts(shape, "nf4", 4).values()) == tensor_bytes(load_base(folder))
    assert len(shape.blocks) == 2
    assert all(block.is_known for block in shape.blocks)
    assert shape.heads == 4


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("gates", [True, False])
def test_the_adapter_takes_just_the_bytes_of_its_tensors(saved, targets, gates):
    folder = saved()
    adapter = Adapter(bytes_per_element=4, dropout=False, trained_gates=gates)
    model = adapt(load_base(folder), target_modules=targets, initial_rank=3, train_gates=gates)
    shape = shape_of(folder, targets)
    layers = model.adapted_layers().values()
    parameters = [entry for layer in layers for entry in (layer.lora_a, layer.lora_b, layer.gate)]
    assert adapter.numel(shape) == sum(parameter.numel() for parameter in parameters)
    assert adapter.trained_numel(shape) == sum(parameter.numel() for parameter in trainable(model).values())
    masks = sum(layer.component_mask.nbytes for layer in layers)
    assert adapter.nbytes(shape) == masks + sum(parameter.nbytes for parameter in parameters)


def test_layers_of_different_ranks_take_just_the_bytes_of_their_tensors(saved):
    folder = saved()
    adapter = Adapter(bytes_per_element=4, dropout=False)
    model = adapt(load_base(folder), ranks="rising-with-depth", target_rank=3).train()
    ranks = {name: len(layer.gate) for name, layer in model.adapted_layers().items()}
    shape = read_shape(load_skeleton(BaseModelSpec(path=str(folder))), ranks)
    assert adapter.numel(shape) == sum(parameter.numel() for parameter in trainable(model).values())
    model(input_ids=tokens())
    stacks = next(iter(model.adapted_layers().values())).gathered.stacks()
    found = SideBySide.of(shape, Batch(rows=1, length=16, compute_bytes=4), adapter)
    assert found.parameters == sum(stack.nbytes for stack in (*stacks.rows, stacks.gates, *stacks.columns))


def test_the_moments_are_those_of_the_real_optimizer(saved):
    folder = saved()
    model = adapt(load_base(folder), initial_rank=3)
    parameters = list(trainable(model).values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    numel = sum(parameter.numel() for parameter in parameters)
    parts = Optimizer(engine="none", world_size=1).parts(numel, 4)
    assert parts["optimizer moments"] == sum(state.nbytes for state in states)
    assert sum(parts.values()) == parts["optimizer moments"]


def test_zero_shards_are_padded_to_two_elements_a_rank():
    """By hand: 1001 elements on 4 ranks are 1008 with padding, 252 a rank."""
    optimizer = Optimizer(engine="zero2", world_size=4)
    assert optimizer.shard_numel(1001) == 252
    parts = optimizer.parts(1001, 2)
    assert parts == {"float32 master copy": 1008, "optimizer moments": 2016, "gradient buckets": 0}
    sizes = [Optimizer(engine="zero2", world_size=size).shard_numel(1_000_000) for size in (1, 2, 4, 8)]
    assert sizes == [1_000_000, 500_000, 250_000, 125_000]


def test_ddp_keeps_everything_on_every_rank():
    parts = Optimizer(engine="ddp", world_size=8).parts(1000, 4)
    assert parts == {"float32 master copy": 0, "optimizer moments": 8000, "gradient buckets": 4000}


def test_the_reduction_bucket_is_that_of_the_launch_file():
    launched = json.loads((REPOSITORY / "launch" / "zero2.json").read_text())["zero_optimization"]
    assert Optimizer(engine="zero2", world_size=1).bucket_numel == launched["reduce_bucket_size"]
    # A second buffer, and gradients that are not copied into one at all, are not counted.
    assert launched["overlap_comm"] is False
    assert launched["contiguous_gradients"] is True


def step(shape, *, recomputed=0, quantization="nf4", adapter=None, engine="zero2", world_size=1, **batch):
    return step_memory(
        TrainingStep(
            shape=shape,
            quantization=quantization,
            batch=Batch(**{"rows": 4, "length": 64, "compute_bytes": 2, **batch}),
            adapter=adapter or Adapter(bytes_per_element=2, dropout=True),
            optimizer=Optimizer(engine=engine, world_size=world_size),
            recomputed=recomputed,
        )
    )


def test_activations_grow_with_tokens_and_scores_with_their_square(saved):
    shape = shape_of(saved())
    once = step(shape)
    for doubled in (step(shape, rows=8), step(shape, length=128)):
        assert doubled.activations == 2 * once.activations
    eager, longer_eager = (step(shape, length=length, attention="eager") for length in (64, 128))
    # Two layers, four heads; the softmax in float32 and its copy in bfloat16.
    scores = 2 * 4 * 4 * 64**2 * (4 + 2)
    assert longer_eager.activations - 2 * eager.activations == 2 * scores
    assert step(shape, padded=True).activations > once.activations


def test_recomputed_layers_keep_their_inputs_only_unless_the_base_hides_its_own(saved):
    shape = shape_of(saved())
    hidden = 4 * 64 * 64 * 2
    assert step(shape, recomputed=2).activations == 2 * hidden
    # bitsandbytes' 8-bit layers keep theirs where checkpointing does not see them, unless they have components.
    assert step(shape, quantization="int8", recomputed=2).activations == 2 * hidden
    bare = shape_of(saved(), ["o_proj"])
    assert step(bare, quantization="int8", recomputed=2).activations > 4 * step(bare, recomputed=2).activations
    with_it, without = (step(shape, recomputed=count, engine="none").peak.total for count in (2, 0))
    assert with_it < without


def test_a_layer_that_is_recomputed_trades_what_it_keeps_for_its_input(saved):
    shape = shape_of(saved(num_hidden_layers=5))
    adapter = Adapter(bytes_per_element=2, dropout=True)
    batch = Batch(rows=4, length=64, compute_bytes=2)
    block = block_memory(shape.blocks[0], shape, batch, adapter, "nf4")
    hidden = 4 * 64 * 64 * 2
    kept = [step(shape, recomputed=count).activations for count in range(6)]
    # The input of the first layer is kept by nobody unless that layer is recomputed.
    assert kept[0] - kept[1] == block.saved - block.input - hidden
    assert [before - after for before, after in pairwise(kept[1:])] == [block.saved - hidden] * 4


def test_the_peak_is_one_instant_and_not_the_sum(saved):
    found = step(shape_of(saved()), recomputed=2)
    assert found.peak.total == max(instant.total for instant in found.instants)
    assert "logits" not in found.instants[1].parts
    assert all("activations" not in instant.parts for instant in found.instants[2:])


def test_more_ranks_leave_less_on_each(saved):
    shape = shape_of(saved())
    resident = [sum(step(shape, world_size=size).resident.values()) for size in (1, 2, 4)]
    assert resident == sorted(resident, reverse=True)
    assert len(set(resident)) == 3


def test_logits_are_three_float32_tensors_of_the_vocabulary():
    assert loss_memory(tokens=1024, vocabulary=1000) == 3 * 4 * 1024 * 1000


def test_a_loss_by_chunks_has_the_logits_of_one_chunk():
    sizes = {"vocabulary": 131072, "hidden_size": 64}
    assert chunked_loss_memory(1024, compute_bytes=4, **sizes) == 4 * 256 * 131072 + (2 * 1024 + 256) * 64 * 4
    assert chunked_loss_memory(1024, compute_bytes=2, **sizes) == 6 * 256 * 131072 + (2 * 1024 + 256) * 64 * 2
    assert chunked_loss_memory(10, compute_bytes=4, **sizes) == 4 * 10 * 131072 + 3 * 10 * 64 * 4


def test_an_unknown_decoder_layer_is_guessed_and_said_to_be(saved):
    folder = saved()
    skeleton = load_skeleton(BaseModelSpec(path=str(folder)))
    for layer in skeleton.model.layers:
        layer.mlp.extra = nn.Linear(64, 64, device="meta")
    shape = read_shape(skeleton, dict.fromkeys(resolve_targets(skeleton, "all-linear"), 3))
    guess, known = step(shape), step(shape_of(folder))
    assert guess.approximate
    assert not known.approximate
    assert 0.5 < guess.activations / known.activations < 2


def test_a_layer_without_adapters_keeps_no_inputs_for_them(saved):
    folder = saved()
    adapter = Adapter(bytes_per_element=4, dropout=True)
    batch = Batch(rows=1, length=16, compute_bytes=4)
    all_linear, one = (shape_of(folder, targets) for targets in ("all-linear", ["v_proj"]))
    sizes = [block_memory(shape.blocks[0], shape, batch, adapter, "nf4").saved for shape in (all_linear, one)]
    # Inputs of o, of gate and up, and of down, a byte an entry for dropout; q and k share the mask of v.
    widths = 64 + 64 + 128
    # Kept inputs: of gate and up together; v shares with q and k, attention keeps that of o, the fused MLP makes that
    # of down again, and the activation too, which the MLP of bare layers keeps.
    inputs = 64 - 128
    assert sizes[0] - sizes[1] == 16 * (inputs * 4 + widths + 6 * 3 * 4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_adapter_side_by_side_takes_just_the_bytes_of_its_tensors(saved, masked):
    folder = saved()
    model = adapt(load_base(folder), initial_rank=3).train()
    layers = list(model.adapted_layers().values())
    layers[0].component_mask[0] = not masked
    model(input_ids=tokens())
    gathered = layers[0].gathered
    stacks, made = gathered._stacks, gathered._operands
    tensors = [
        *stacks.rows,
        stacks.gates,
        *stacks.columns,
        *(one for each in made for one in (each.rows, *each.columns)),
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    adapter = Adapter(bytes_per_element=4, dropout=False, masked=masked)
    found = SideBySide.of(shape_of(folder), Batch(rows=1, length=16, compute_bytes=4), adapter)
    assert found.parameters + found.components == sum(storages.values())
    assert found.largest == max(stack.numel() for stack in (*stacks.rows, *stacks.columns))


def test_rows_of_new_tokens_take_a_copy_of_the_head_and_are_optimized(saved):
    without = TrainingStep(
        shape=shape_of(saved()),
        quantization="nf4",
        batch=Batch(rows=1, length=16, compute_bytes=4),
        adapter=Adapter(bytes_per_element=4, dropout=False),
        optimizer=Optimizer(engine="none", world_size=1),
        recomputed=0,
        chunked_loss=False,
    )
    plain, more = step_memory(without), step_memory(replace(without, new_rows=256))
    assert more.instants[0].parts["copy of the head for new tokens"] == 2 * 4 * 96 * 64
    for name, size in {"adapter": 4 * 256, "optimizer moments": 2 * 4 * 256}.items():
        assert more.resident[name] - plain.resident[name] == size


def test_gradients_of_components_wait_for_the_end_of_the_backward(saved):
    """By hand: in the first layer's backward there are those of the four others, and at the end of all five."""
    shape = shape_of(saved(num_hidden_layers=5), rank=300)
    adapter = Adapter(bytes_per_element=2, dropout=True, penalty=False)
    of_layer = 2 * 300 * sum(linear.in_features + linear.out_features for linear in shape.blocks[0].linears)
    parts = {instant.name: instant.parts for instant in step(shape, recomputed=5, adapter=adapter).instants}
    assert parts["backward of a recomputed layer"]["adapter gradients"] == 4 * of_layer
    gates = 2 * 300 * 5 * 7
    assert parts["end of the backward"]["adapter gradients"] == 5 * of_layer + gates
    alone = shape_of(saved(num_hidden_layers=5), fuse=False, rank=300)
    instants = step(alone, recomputed=5, adapter=adapter).instants
    assert "end of the backward" not in {instant.name for instant in instants}
    assert not any(instant.parts.get("adapter side by side") for instant in instants)
