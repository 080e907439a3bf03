"""The elastic net (Zou and Hastie 2005) on one tensor, and the projection of rows into a ball (max-norm).

    value       sum of l1 |p| + l2 / 2 p^2
    gradient    l1 sign(p) + l2 p
    projection  p min(1, radius / |p|) of each row

The tuned twin, ``kernels/penalties.py``, takes all tensors of a model in one launch.
"""

import triton
import triton.language as tl


@triton.jit
def penalize(p_ptr, gradient_ptr, values_ptr, size, l1: tl.float32, l2: tl.float32, BLOCK: tl.constexpr):
    """p, gradient [size]; values fp32 [blocks], which torch adds up. Grid: (blocks,)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(p_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    sign = tl.where(p > 0, 1.0, tl.where(p < 0, -1.0, 0.0))
    tl.store(gradient_ptr + element, l1 * sign + l2 * p, mask=element < size)
    tl.store(values_ptr + tl.program_id(0), tl.sum(l1 * tl.abs(p) + l2 / 2 * p * p))


@triton.jit
def project_rows(p_ptr, columns, radius: tl.float32, BLOCK: tl.constexpr):
    """p [rows, columns] is written. Grid: (rows,)."""
    column = tl.arange(0, BLOCK)
    element = tl.program_id(0).to(tl.int64) * columns + column
    p = tl.load(p_ptr + element, mask=column < columns, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(p * p))
    tl.store(p_ptr + element, tl.where(norm > radius, p * (radius / norm), p), mask=column < columns)
