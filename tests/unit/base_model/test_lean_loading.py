"""Lean loading gives the same bits as transformers' own, and a model that is not all there is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import load_base, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, modeling_utils

from dora_dist.base_model import lean_loading
from dora_dist.base_model.quantization import quantization_config

SHARD = "60KB"


def plain(folder, quantization, dtype):
    """As transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config(quantization, dtype), dtype=dtype, device_map={"": "cpu"}
    )


def contents(model):
    """All tensors of a model by name, with the constants of quantized ones."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, parameter in list(found.items()):
        if getattr(parameter, "quant_state", None) is not None:
            state = parameter.quant_state.as_dict(packed=False)
            found |= {f"{name}:{key}": value for key, value in state.items()}
        if getattr(parameter, "SCB", None) is not None:
            found |= {f"{name}:SCB": parameter.SCB, f"{name}:CB": parameter.CB}
    return found


def assert_same(model, other):
    ours, theirs = contents(model), contents(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert type(value) is type(theirs[name]), name
            assert (value.dtype, value.shape, value.stride()) == (
                theirs[name].dtype,
                theirs[name].shape,
                theirs[name].stride(),
            ), name
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name


@pytest.fixture(params=["whole weights", "pieces"])
def pieces(request, monkeypatch):
    """Tiny weights are smaller than a piece; 192 elements divide no weight and no row of them."""
    if request.param == "pieces":
        monkeypatch.setattr(lean_loading, "PIECE_NUMEL", 192)


def save(folder, architecture="llama", dtype=torch.bfloat16, shard="1GB", **changes):
    model = tiny_model(architecture, intermediate_size=133, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", SHARD])
@pytest.mark.parametrize("tied", [True, False])
def test_the_bits_are_those_of_transformers(quantization, dtype, shard, tied, pieces, tmp_path):
    save(tmp_path, shard=shard, tie_word_embeddings=tied)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == SHARD)
    model = load_base(tmp_path, quantization, dtype)
    assert_same(model, plain(tmp_path, quantization, dtype))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("architecture", ["gemma", "qwen3"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_other_architectures_too(architecture, quantization, pieces, tmp_path):
    save(tmp_path, architecture, shard=SHARD)
    assert_same(load_base(tmp_path, quantization), plain(tmp_path, quantization, torch.float32))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_transposed_weights_too(quantization, pieces, tmp_path):
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_same(load_base(tmp_path, quantization), plain(tmp_path, quantization, torch.float32))


def test_old_pickled_weights_too(pieces, tmp_path):
    save(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    expected = plain(tmp_path, "nf4", torch.float32)
    (tmp_path / "model.safetensors").unlink()
    assert_same(load_base(tmp_path), expected)


def test_the_configurations_and_names_are_those_of_transformers(tmp_path):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    ours, theirs = load_base(tmp_path), plain(tmp_path, "nf4", torch.float32)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path == str(tmp_path)
    assert {**ours.config.to_dict(), "use_cache": None} == {**theirs.config.to_dict(), "use_cache": None}


def test_a_piece_of_a_large_weight_is_not_rounded_differently():
    """With pieces as large as they are."""
    weight = torch.randn(1000, 1001, generator=torch.Generator().manual_seed(0))
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, 64, "nf4", torch.uint8)
    codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.half())
    with lean_loading.QuantizedInPieces():
        again = torch.ops.bitsandbytes.quantize_4bit.default(weight, 64, "nf4", torch.uint8)
        rows = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.half())
    assert torch.equal(packed, again[0])
    assert torch.equal(absmax, again[1])
    assert torch.equal(codes, rows[0])
    assert torch.equal(scales, rows[1])


def test_outliers_of_a_whole_weight_stay_a_matter_of_the_whole_weight(monkeypatch):
    monkeypatch.setattr(lean_loading, "PIECE_NUMEL", 64)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).half()
    weight[20, 3] = 50
    expected = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.clone(), 6.0)
    with lean_loading.QuantizedInPieces():
        found = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.clone(), 6.0)
    assert expected[2].tolist() == found[2].tolist() == [3]
    assert torch.equal(expected[0], found[0])


def test_transformers_is_left_as_it_was(tmp_path):
    before = modeling_utils.safe_open
    load_base(save(tmp_path / "whole"))
    (save(tmp_path / "broken") / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        load_base(tmp_path / "broken")
    assert modeling_utils.safe_open is before


# What is refused.


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped, as for a GPU", "read, as for a CPU"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_seen_where_the_tensor_goes(bad, mapped, tmp_path):
    spoilt = {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}

    def spoil(tensors):
        for name in spoilt:
            tensors[name].view(-1)[-1] = bad

    folder = change(save(tmp_path), spoil)
    with lean_loading._files_read(torch.device("cpu"), mapped) as not_finite:
        plain(folder, "nf4", torch.float32)
        assert not not_finite, "the answers are read once, at the end"
    assert not_finite == spoilt


def change(folder, changed):
    """Apply ``changed`` to the tensors of the model's one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def test_a_missing_file_is_named(tmp_path):
    save(tmp_path, shard=SHARD)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"model.path .* cannot be read.*{gone.name}"):
        load_base(tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("left", [0, 4, 100, -100])
def test_a_file_that_is_cut_off_is_named(left, quantization, tmp_path):
    save(tmp_path, shard=SHARD)
    cut = sorted(tmp_path.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"model.path .* cannot be read: .*{cut.name} is damaged.*download .* again"):
        load_base(tmp_path, quantization)


def test_an_index_that_is_cut_off_is_refused(tmp_path):
    index = save(tmp_path, shard=SHARD) / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    with pytest.raises(ValueError, match=r"the weights at model.path .* cannot be read: .*download the model again"):
        load_base(tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_weight_is_not_made_up(name, quantization, tmp_path):
    folder = change(save(tmp_path), lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"has no weights for {name}: .* copy or download"):
        load_base(folder, quantization)


def test_many_missing_weights_are_counted(tmp_path):
    folder = change(save(tmp_path), lambda tensors: [tensors.pop(name) for name in list(tensors) if ".1." in name])
    with pytest.raises(ValueError, match=r"has no weights for (model\.layers\.1\.\S+, ){4}\S+ and 4 more: "):
        load_base(folder)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize(
    ("name", "shape"), [("model.layers.0.mlp.up_proj.weight", (64, 133)), ("model.embed_tokens.weight", (96, 32))]
)
def test_a_weight_of_another_shape_is_refused(name, shape, quantization, tmp_path):
    folder = change(save(tmp_path), lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=rf"of another shape .*: {name} \({shape[0]}, {shape[1]}\) instead of "):
        load_base(folder, quantization)


def test_a_bias_that_the_configuration_does_not_know_is_refused(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = change(save(tmp_path), lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(ValueError, match=f"holds {name}, for which its config.json has no place"):
        load_base(folder)


def test_a_head_for_another_task_is_left_out(tmp_path):
    expected = load_base(save(tmp_path / "before"))
    folder = change(save(tmp_path / "after"), lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 64)}))
    assert_same(load_base(folder), expected)
