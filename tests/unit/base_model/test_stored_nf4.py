"""A base that comes in bitsandbytes' NF4 is read as it is, and any other quantized base is refused."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from support.tiny_models import adapt, load_base, logits, loss_and_gradients, save_stored, shake, tiny_model
from transformers import AutoModelForCausalLM

from dora_dist.base_model.block_weights import check_quantized
from dora_dist.base_model.load import BaseModelSpec, HeadStart, load_base_model, load_skeleton
from dora_dist.base_model.quantization import dequantized_weight, forbid_inference_packing
from dora_dist.base_model.shape import read_shape

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def base(tmp_path):
    tiny_model(intermediate_size=133).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("stored", DTYPES, ids=["stored with float32", "stored with bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["in float32", "in bfloat16"])
def test_it_trains_as_the_base_that_is_quantized_on_the_way(stored, dtype, base, tmp_path):
    folder = save_stored(tmp_path / "stored", base, stored)
    models = [shake(adapt(load_base(path, dtype=dtype))).train() for path in (base, folder)]
    losses, gradients = zip(*map(loss_and_gradients, models), strict=True)
    assert torch.equal(*losses)
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert [tensor.dtype for tensor in models[1].parameters()] == [tensor.dtype for tensor in models[0].parameters()]


def test_constants_that_are_not_quantized_are_taken_as_they_are(base, tmp_path):
    folder = save_stored(tmp_path / "stored", base, bnb_4bit_use_double_quant=False)
    model = load_base(folder)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.state2 is None
    stock = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    forbid_inference_packing(stock)
    assert torch.equal(logits(model), logits(stock))
    assert not torch.equal(logits(model), logits(load_base(base)))
    loss_and_gradients(shake(adapt(model)).train())


def test_blocks_are_as_long_as_they_are_stored(base, tmp_path):
    folder = save_stored(tmp_path / "stored", base)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = load_file(base / "model.safetensors")[name].float()
    codes, state = quantize_4bit(whole, blocksize=128, quant_type="nf4", compress_statistics=True)
    tensors |= {name: codes, **{f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layer = load_base(folder).get_submodule(name.removesuffix(".weight"))
    assert layer.weight.quant_state.blocksize == 128
    assert torch.equal(dequantized_weight(layer), dequantize_4bit(codes, state))


def test_what_its_files_have_in_16_bits_stays_so(base, tmp_path):
    folder = save_stored(tmp_path / "stored", base, llm_int8_skip_modules=["lm_head", "mlp.down_proj"])
    spec = BaseModelSpec(path=str(folder))
    shape = read_shape(load_skeleton(spec), {})
    assert {linear.kind for linear in shape.linears if linear.unquantized} == {"lm_head", "down_proj"}
    with pytest.raises(ValueError, match=r"22\.5% of the block weights would stay in 16 bits.*mlp.down_proj"):
        check_quantized(load_skeleton(spec), "nf4", allow_unquantized=False)
    model = load_base_model(spec)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.weight, load_base(base, "none").model.layers[1].mlp.down_proj.weight
    )


def test_a_head_starts_anew_on_it(base, tmp_path):
    head = HeadStart(labels=("no", "yes"), seed=3)
    models = [
        load_base_model(BaseModelSpec(path=str(path), task="sequence_classification"), head=head)
        for path in (base, save_stored(tmp_path / "stored", base))
    ]
    assert torch.equal(models[0].score.weight, models[1].score.weight)
    for model in models:
        model.config.pad_token_id = 0
    assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_it_is_not_taken_for_what_it_is_not(quantization, base, tmp_path):
    folder = save_stored(tmp_path / "stored", base)
    with pytest.raises(ValueError, match=f"model.quantization is {quantization}, but .* is stored in NF4"):
        load_skeleton(BaseModelSpec(path=str(folder), quantization=quantization))


BITS8 = {"load_in_8bit": True, "load_in_4bit": False, "quant_method": "bitsandbytes"}
NF4 = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes' FP4"),
        ({"load_in_4bit": True}, "bitsandbytes' FP4"),
        (BITS8, "bitsandbytes' 8 bits"),
        ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "bitsandbytes' NF4 in tensors of bfloat16"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
    ],
)
def test_other_quantized_bases_are_refused_with_what_can_be_done(settings, kind, base):
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(ValueError, match=f"stored quantized by {kind}, on which .* 16 bits.*dora-dist quantize"):
        load_skeleton(BaseModelSpec(path=str(base)))


@pytest.mark.parametrize("part", ["absmax", "quant_state.bitsandbytes__nf4", "nested_absmax"])
def test_constants_that_are_missing_are_not_made_up(part, base, tmp_path):
    folder = save_stored(tmp_path / "stored", base)
    name = f"model.layers.0.mlp.up_proj.weight.{part}"
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight.nested_absmax|constants of some are missing"):
        load_base(folder)
