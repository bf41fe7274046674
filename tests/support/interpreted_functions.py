"""What Triton's interpreter does not have of CUDA's own functions. Imported where Triton is installed only."""

import triton
from triton import language


@triton.jit
def rsqrt(x):
    return language.rsqrt(x)
