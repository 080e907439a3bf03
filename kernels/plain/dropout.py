"""Dropout (Srivastava et al. 2014): y = x / (1 - p) where kept, else 0.

No mask is stored: an element's random bits depend on the seed and its position, and the backward pass draws them again.
The tuned twin is ``kernels/dropout.py``.
"""

import triton
import triton.language as tl

from .draw import lane


@triton.jit
def _dropped(x_ptr, y_ptr, seed, threshold, scale, columns, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    element = tl.program_id(0).to(tl.int64) * columns + column
    x = tl.load(x_ptr + element, mask=column < columns, other=0.0).to(tl.float32)
    keep = lane(element, seed, tl.full([], 0, tl.int64)) >= threshold
    tl.store(y_ptr + element, tl.where(keep, x * scale, 0.0), mask=column < columns)


@triton.jit
def forward(x_ptr, y_ptr, seed: tl.int64, threshold, scale: tl.float32, columns, BLOCK: tl.constexpr):
    """x, y [rows, columns]; threshold = round(p 2^16), scale = 2^16 / (2^16 - threshold). Grid: (rows,)."""
    _dropped(x_ptr, y_ptr, seed, threshold, scale, columns, BLOCK)


@triton.jit
def backward(dy_ptr, dx_ptr, seed: tl.int64, threshold, scale: tl.float32, columns, BLOCK: tl.constexpr):
    """dx = dy / (1 - p) where kept: the same function of dy."""
    _dropped(dy_ptr, dx_ptr, seed, threshold, scale, columns, BLOCK)
