"""Gaussian noise: y = x + std eps, or y = x (1 + std eps), with a standard normal eps for each element.

No noise is stored: eps depends on the seed and the position alone. The gradient of the first form is dy, that of the
second dy (1 + std eps): the same kernel on dy. The tuned twin is ``kernels/noise.py``.
"""

import triton
import triton.language as tl

from .draw import normal


@triton.jit
def add_noise(
    x_ptr, y_ptr, seed: tl.int64, std: tl.float32, columns, MULTIPLICATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """x, y [rows, columns]. Grid: (rows,)."""
    column = tl.arange(0, BLOCK)
    element = tl.program_id(0).to(tl.int64) * columns + column
    x = tl.load(x_ptr + element, mask=column < columns, other=0.0).to(tl.float32)
    eps = normal(element, seed, tl.full([], 0, tl.int64))
    y = x * (1 + std * eps) if MULTIPLICATIVE else x + std * eps
    tl.store(y_ptr + element, y, mask=column < columns)
