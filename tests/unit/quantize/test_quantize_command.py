"""A base that is written in 4 bits: stock transformers reads it, with the bits that it would quantize the base to."""

import json
import os
import stat
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from many_shards import save_many_shards, size_of_shards
from process_memory import MemoryWatch
from safetensors.torch import load_file, save_file
from support.tiny_models import logits, quantized_model, tiny_model
from support.tiny_run import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen3ForCausalLM

from dora_dist.adapter.from_folder import FoundAdapter, describe_start
from dora_dist.adapter.plain_lora import FoundLora
from dora_dist.base_model.lean_loading import return_freed_memory
from dora_dist.base_model.load import BaseModelSpec
from dora_dist.base_model.quantization import forbid_inference_packing, quantization_config
from dora_dist.quantize import __main__ as quantize
from dora_dist.quantize import writing

MB = 10**6
LORA = FoundLora(lora_a=torch.ones(1, 2), lora_b=torch.ones(2, 1), scale=1.0)


def stock(folder, **options):
    """In the dtype that it is stored in, whatever is asked for (transformers 5.23)."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options)
    forbid_inference_packing(model)  # which fails on the 133 outputs of a layer, on CPUs that it is for
    return model


@pytest.fixture
def base(tmp_path):
    folder = save_tiny_model(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5}))
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("about 16 bits")
    return folder


@pytest.mark.parametrize("shard", [10**9, 30_000], ids=["one file", "many files"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
def test_stock_transformers_reads_it_as_it_would_quantize_the_base(architecture, shard, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "SHARD_BYTES", shard)
    model = tiny_model(architecture, intermediate_size=133).to(torch.bfloat16)  # 133 leaves a block unfilled
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    quantize.main([str(tmp_path / "base"), str(tmp_path / "out"), "--compute-dtype", "float32"])
    found = stock(tmp_path / "out")
    expected = stock(
        tmp_path / "base", quantization_config=quantization_config("nf4", torch.bfloat16), dtype=torch.bfloat16
    )
    assert torch.equal(logits(found), logits(expected))
    assert (len(size_of_shards(tmp_path / "out")) > 1) == (shard == 30_000)
    assert found.config.quantization_config.bnb_4bit_compute_dtype is torch.bfloat16, "that of the base"
    # What is not quantized stays as small as it was.
    sizes = [sum(size_of_shards(tmp_path / name)) for name in ("base", "out")]
    assert sizes[1] < 0.7 * sizes[0]
    said = capsys.readouterr().out
    assert "14 linear layers in NF4" in said
    assert f"model.path: {tmp_path / 'out'}" in said


def test_what_else_a_model_has_comes_with_it(base, tmp_path):
    quantize.main([str(base), str(tmp_path / "out")])
    out = tmp_path / "out"
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert stock(out).generation_config.temperature == 0.5
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert settings["bnb_4bit_use_double_quant"]
    assert settings["quantized_from"] == str(base)
    assert config == json.loads((base / "config.json").read_text())
    assert (out / "LICENSE").is_file()
    assert not (out / "README.md").exists()


@pytest.mark.parametrize(
    ("trained_on", "goes_on_with", "warns"),
    [("base", "out", False), ("out", "base", False), ("out", "out", False), ("other", "out", True)],
)
def test_an_adapter_goes_on_with_the_base_or_its_4_bits_and_another_base_is_told(
    trained_on, goes_on_with, warns, base, tmp_path
):
    quantize.main([str(base), str(tmp_path / "out")])
    found = FoundAdapter(folder=tmp_path, layers={"q_proj": LORA}, base_model=str(tmp_path / trained_on))
    remarks = describe_start(found, str(tmp_path / goes_on_with), {"q_proj": 1})
    warning = f"{tmp_path} was trained on {tmp_path / 'other'}, but model.path is {tmp_path / 'out'}"
    assert remarks[1:] == [f"warning: {warning}"] * warns


def test_whoever_may_read_the_folder_may_read_its_files(base, tmp_path):
    before = os.umask(0o022)
    try:
        quantize.main([str(base), str(tmp_path / "out")])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """65 MB in 16 bits, 17 MB in 4."""
    return save_many_shards(tmp_path_factory.mktemp("large") / "base", hidden=512, layers=10, shard_bytes=20 * MB)


def quantize_and_watch(base, out):
    warm = save_tiny_model(out.with_name("tiny"))
    writing.write_quantized(BaseModelSpec(path=str(warm)), Path(mkdtemp(dir=out.parent)), torch.device("cpu"))
    out.mkdir()
    return_freed_memory()
    with MemoryWatch() as watch:
        written = writing.write_quantized(BaseModelSpec(path=str(base)), out, torch.device("cpu"))
    assert written.bytes_before == sum(size_of_shards(base)) > 60 * MB
    assert written.bytes_after == pytest.approx(sum(size_of_shards(out)), rel=0.01)
    return watch, written


def test_neither_the_16_bits_nor_the_4_are_in_memory_as_a_whole(large, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", MB)
    watch, written = quantize_and_watch(large, tmp_path / "out")
    # 4 MB are the largest tensor in 16 bits and in float32, 2 a file before and while it is written.
    assert watch.resident < 0.95 * written.bytes_after


@pytest.mark.full("memory")
def test_a_command_that_holds_all_4_bits_would_be_noticed(large, tmp_path):
    watch, written = quantize_and_watch(large, tmp_path / "out")
    assert written.files == 1
    assert watch.resident > written.bytes_after


def test_what_was_interrupted_is_no_model(base, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_copy_others", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize.main([str(base), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    # Nor is what a kill leaves, whose name says so and which has no configuration.
    (tmp_path / ".out.1.tmp").mkdir()
    with pytest.raises(KeyboardInterrupt):
        writing.write_quantized(BaseModelSpec(path=str(base)), tmp_path / ".out.1.tmp", torch.device("cpu"))
    assert [path.name for path in (tmp_path / ".out.1.tmp").iterdir()] == ["model.safetensors"]


def test_a_folder_that_exists_is_not_written_to(base, tmp_path):
    with pytest.raises(ValueError, match=r"base exists already: give another folder as OUT"):
        quantize.main([str(base), str(base)])


def test_a_base_in_4_bits_is_not_quantized_again(base, tmp_path):
    quantize.main([str(base), str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"out is quantized already: runs read it as it is"):
        quantize.main([str(tmp_path / "out"), str(tmp_path / "again")])


def test_a_model_that_is_not_built_as_llama_is_refused(tmp_path):
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"is a gpt2, whose decoder layers are not built as Llama's"):
        quantize.main([str(tmp_path / "base"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def change(base, changed):
    path = base / "model.safetensors"
    tensors = load_file(path)
    changed(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "has no weights for model.norm.weight"),
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "not finite .* in model.norm.weight"),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 100)}),
            r"of another shape .*up_proj.weight \(64, 100\) instead of \(128, 64\)",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(128)}),
            "up_proj.bias, for which its config.json has no place",
        ),
    ],
    ids=["missing", "not finite", "another shape", "a bias too many"],
)
def test_weights_that_are_not_those_of_the_model_are_refused(changed, message, base, tmp_path):
    change(base, changed)
    with pytest.raises(ValueError, match=message):
        quantize.main([str(base), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_file_that_is_missing_or_damaged_is_named(base, tmp_path):
    (base / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read.*download the model again"):
        quantize.main([str(base), str(tmp_path / "out")])
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights as safetensors"):
        quantize.main([str(base), str(tmp_path / "out")])


def test_a_head_that_is_tied_may_be_left_out(tmp_path):
    model = tiny_model("qwen3", tie_word_embeddings=True)
    assert type(model) is Qwen3ForCausalLM
    model.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    quantize.main([str(tmp_path / "base"), str(tmp_path / "out")])
    expected = quantized_model(tmp_path / "base", "nf4")
    forbid_inference_packing(expected)
    assert torch.equal(logits(stock(tmp_path / "out")), logits(expected))
