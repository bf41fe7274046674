import pytest
import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from support.tiny_models import adapt, loss_and_gradients, quantized_model, shake, tiny_model, tokens
from torch import nn

from dora_dist.base_model.quantization import dequantized_weight, forbid_inference_packing, quantization_config

packing_cpu = pytest.mark.skipif(
    not bnb_functional.has_avx512bf16(), reason="bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only"
)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_model().save_pretrained(folder)
    return folder


def quantized_linear(kind: str, weight: torch.Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    if kind == "int8":
        layer = Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    elif kind == "plain":
        layer = nn.Linear(in_features, out_features, bias=False)
        layer.weight = nn.Parameter(weight)
    else:
        double = kind == "nf4 double"
        layer = Linear4bit(
            in_features,
            out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
            compress_statistics=double,
        )
        layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double)
    layer.to("cpu")
    forbid_inference_packing(layer)
    return layer


@pytest.mark.parametrize(
    ("kind", "rounding"),
    # Largest gap of the levels, as a share of the largest weight of a block (4 bits) or row (8 bits).
    [("plain", 0.0), ("nf4", 0.16), ("nf4 double", 0.17), ("int8", 1 / 127)],
)
@pytest.mark.parametrize("used_before", [False, True])
def test_the_dequantized_weight_is_what_the_layer_computes_with(kind, rounding, used_before):
    original = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    layer = quantized_linear(kind, original.clone())
    if used_before:
        layer(torch.ones(1, 128))
    weight = dequantized_weight(layer)
    assert weight.shape == (48, 128)
    assert weight.dtype == torch.float32
    with torch.no_grad():
        computed = layer(torch.eye(128)).T
    # The identity's rows are exact in int8 activations as well (0 and the row's maximum), so that only float32
    # rounding is left; another version may compute 8-bit layers in half precision, which keeps 1e-3.
    tolerance = 1e-3 if kind == "int8" else 1e-6
    torch.testing.assert_close(weight, computed, rtol=tolerance, atol=tolerance)
    assert (weight - original).abs().max() <= rounding * original.abs().max()


@packing_cpu
def test_an_evaluation_before_training_does_not_cut_gradients(saved_model):
    fresh, evaluated = (shake(adapt(quantized_model(saved_model, "nf4"))) for _ in range(2))
    with torch.no_grad():
        evaluated.eval()(input_ids=tokens())
    (loss, gradients), (loss_after, gradients_after) = (loss_and_gradients(m.train()) for m in (fresh, evaluated))
    assert torch.equal(loss, loss_after)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients_after[name]), name


@packing_cpu
def test_a_weight_already_repacked_for_inference_is_refused(saved_model):
    model = quantized_model(saved_model, "nf4").eval()
    with torch.no_grad():
        model(input_ids=tokens())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has been repacked.*load the model again"):
        adapt(model)


def test_nf4_is_that_of_qlora():
    config = quantization_config("nf4", torch.bfloat16)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_the_other_quantizations_are_eight_bit_and_none():
    assert quantization_config("int8", torch.float32).load_in_8bit
    assert quantization_config("none", torch.float32) is None


def test_an_unknown_quantization_is_refused():
    with pytest.raises(ValueError, match=r"quantization is 'fp4'.*nf4, int8, none"):
        quantization_config("fp4", torch.float32)
