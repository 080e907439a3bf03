"""Tiles of matrices, as several kernels load and multiply them."""

import triton
import triton.language as tl

from .fastmath import INTERPRETED, upcast


@triton.jit
def block_of_program(first_blocks):
    """The block of the first axis and the block of the second axis that this program takes.

    The grid has both axes in one dimension, because CUDA's second dimension ends at 65,535.
    """
    second = tl.program_id(0) // first_blocks
    return tl.program_id(0) - second * first_blocks, second


@triton.jit
def weight_tile(w_ptr, first_row, first_column, shape, plan: tl.constexpr):
    """The tile [plan.rows, plan.columns] of w [shape.rows, shape.columns].

    plan.transposed: the tile [plan.columns, plan.rows] of w [shape.columns, shape.rows].
    plan.even: the tiles cover w exactly, and no mask is needed.
    """
    row = first_row + tl.arange(0, plan.rows)
    column = first_column + tl.arange(0, plan.columns)
    if plan.transposed:
        place = column.to(tl.int64)[:, None] * shape.rows + row[None, :]
        inside = (column < shape.columns)[:, None] & (row < shape.rows)[None, :]
    else:
        place = row.to(tl.int64)[:, None] * shape.columns + column[None, :]
        inside = (row < shape.rows)[:, None] & (column < shape.columns)[None, :]
    return tl.load(w_ptr + place) if plan.even else tl.load(w_ptr + place, mask=inside, other=0.0)


@triton.jit
def plus_product(z, a, b, PRECISION: tl.constexpr):
    """z + a b, on the tensor cores.

    PRECISION: "tf32" or "tf32x3", for fp32; 16-bit numbers are exact in both. With "tf32" the tensor cores read 10 bits
    after the leading one, and so does the interpreted product.
    """
    if INTERPRETED:
        a, b = upcast(a), upcast(b)
        if PRECISION == "tf32":
            a, b = _cut(a), _cut(b)
        return tl.dot(a, b, z)
    else:
        return tl.dot(a, b, z, input_precision=PRECISION)


@triton.jit
def _cut(x):
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
