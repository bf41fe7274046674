"""Liger's kernels on a CPU, in Triton's interpreter."""

import pytest
import torch

MISSING = "liger-kernel or triton is not installed: CI_FULL=kernels bash launch/test.sh installs both"


def prepare_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process run Liger's kernels, or skip the test with the reason.

    Triton's interpreter (3.6 to 3.9) hands numbers to a kernel as Python's floats, without the methods of Triton's
    scalars, and has none of CUDA's own functions. The replacements here can go when ``test_kernels.py`` passes without
    them. With bfloat16 the interpreter computes nonsense, so those tests are in tests/gpu.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which tests/gpu runs the kernels")
    pytest.importorskip("triton", reason=MISSING)
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm", reason=MISSING)
    import numpy
    from triton import language
    from triton.runtime import interpreter

    from support.interpreted_functions import rsqrt

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument: object) -> object:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), language.float32)
        return language.tensor(handle, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)
