"""What the benchmark's command line refuses, and what it takes a shape to be."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from dora_dist.benchmark.options import CONTESTANTS, LIGER, build_parser, check_device, resolve
from dora_dist.benchmark.shapes import parse_shape


def options(*arguments):
    return resolve(build_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shapes 500x8", "--shapes has '500x8'.*WIDTHxLAYERS.*multiple of 64"),
        ("--shapes 512x0", "--shapes has '512x0'"),
        ("--shapes large", "--shapes has 'large'"),
        ("--rounds 0", r"--rounds is 0, but must lie in \[1, "),
        ("--warmup -1", "--warmup is -1"),
        ("--dropout 0.1 1", r"--dropout is 1.0, but must lie in \[0, 1\)"),
        ("--rank 4", "--rank is 4, below the target rank 8.*raise --rank"),
        ("--target-rank 0", "--target-rank is 0"),
        ("--sequence 1", "--sequence is 1, but must be at least 2"),
        ("--batch 0", "--batch is 0, but must be at least 1"),
        ("--contestants peft-lora floo", "--contestants has 'floo', but must be of floor, "),
        ("--contestants peft-lora peft-liger", "--contestants has peft-liger, .* give --device cuda"),
        ("--contestants floor dynamic", "must include peft-lora"),
        ("--profile floor --contestants peft-lora", "--profile is floor, which is not among --contestants"),
        ("--profile nobody", "--profile has 'nobody'"),
        ("--peak-tflops 0", "--peak-tflops is 0.0, but must be positive"),
        ("--adapter-dtype bfloat16", "--adapter-dtype is bfloat16, but must be float32"),
        ("--device cuda --kernels rope silu", "--kernels has 'silu', but must be of rms_norm, rope, swiglu"),
        ("--kernels rope", "--kernels is given, which are for GPUs, but --device is cpu: give --device cuda"),
        ("--growth --device cuda", "--device is cuda, but --growth"),
        (f"--output {__file__}", "--output is .*, but .* is not a writable folder"),
    ],
)
def test_an_option_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        options(*arguments.split())


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_a_contestant_whose_package_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--contestants has peft-liger, but the package liger-kernel is not installed"):
        options("--device", "cuda", "--contestants", "peft-lora", "peft-liger")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device is cuda, but torch sees no GPU"):
        check_device("cuda")


def test_by_default_the_shapes_of_the_comparison_on_a_cpu():
    chosen = options()
    assert [shape.name for shape in chosen.shapes] == ["512x8", "1024x4", "2048x2"]
    assert all((shape.sequence, shape.batch, shape.checkpointing) == (256, 4, (False, True)) for shape in chosen.shapes)
    assert chosen.contestants == tuple(name for name in CONTESTANTS if name != LIGER)
    assert (chosen.rank, chosen.target_rank, chosen.dropouts) == (12, 8, (0.0,))
    assert (chosen.compute_dtype, chosen.adapter_dtype) == ("float32", "float32")
    assert chosen.output == Path("benchmarks/results")


def test_the_shape_for_a_gpu():
    (shape,) = options("--shapes", "8b", "--device", "cuda").shapes
    assert (shape.sequence, shape.batch, shape.checkpointing) == (2048, 1, (True,))
    assert sorted(set(shape.linears())) == [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)]
    assert shape.layers * len(list(shape.linears())) == 224


def test_the_operations_of_a_step():
    shape = parse_shape("64x1")  # an MLP of 192, and a head of 4096 x 64
    weights = 4 * 64 * 64 + 3 * 64 * 192 + 4096 * 64
    assert shape.step_flops == 4 * weights * 1024 + 6 * 4 * 64 * 256**2
