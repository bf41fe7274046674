"""Functions of CUDA that Triton's interpreter lacks. Imported only where Triton is installed."""

import triton
from triton import language


@triton.jit
def rsqrt(x):
    return language.rsqrt(x)
