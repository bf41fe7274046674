"""A base that is read onto a GPU: transformers' own bits, and what is looked at there."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from dora_dist.base_model.load import BaseModelSpec, load_base_model
from dora_dist.base_model.quantization import quantization_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def load(folder, quantization):
    spec = BaseModelSpec(path=str(folder), quantization=quantization, compute_dtype=torch.bfloat16)
    return load_base_model(spec, "cuda")


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_bits_are_those_of_transformers_and_all_of_them_are_on_the_gpu(quantization, tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    ours = load(tmp_path, quantization)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=quantization_config(quantization, torch.bfloat16),
        dtype=torch.bfloat16,
        device_map={"": "cuda"},
    )
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.is_cuda, name
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"not finite \(NaN or infinite\) in model\.layers\.1\.mlp\.up_proj\.weight: copy"
    ):
        load(tmp_path, "nf4")


def test_no_more_than_the_quantized_base_and_a_tensor_is_on_the_gpu(tmp_path):
    model = tiny_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=1024)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    largest = max(parameter.nbytes for parameter in model.parameters())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours = load(tmp_path, "nf4")
    kept = torch.cuda.memory_allocated() - before
    assert kept < 0.5 * sum(parameter.nbytes for parameter in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < kept + 4 * largest
    assert ours.device.type == "cuda"
