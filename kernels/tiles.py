"""Tiles of matrices, as several kernels load and multiply them."""

import triton
import triton.language as tl

from .fastmath import INTERPRETED, upcast


@triton.jit
def block_of_program(first_blocks):
    """Which block of the first axis and of the second this program has, of a grid that is both axes in one dimension:
    CUDA's second dimension ends at 65,535."""
    second = tl.program_id(0) // first_blocks
    return tl.program_id(0) - second * first_blocks, second


@triton.jit
def weight_tile(
    w_ptr, first_row, first_column, rows, columns,
    TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile [ROWS, COLUMNS] of w [rows, columns], or TRANSPOSED [COLUMNS, ROWS] of w [columns, rows].

    EVEN: the tiles cover w exactly, and no mask is needed.
    """
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        place = column.to(tl.int64)[:, None] * rows + row[None, :]
        inside = (column < columns)[:, None] & (row < rows)[None, :]
    else:
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(w_ptr + place) if EVEN else tl.load(w_ptr + place, mask=inside, other=0.0)


@triton.jit
def plus_product(z, a, b, PRECISION: tl.constexpr):
    """z + a b, on the tensor cores. PRECISION: "tf32" or "tf32x3", of fp32; 16 bits are exact in both.

    Interpreted, it is what they compute: of "tf32" they take no more than 10 bits behind the first.
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
