"""Tiles of matrices, as several kernels load them."""

import triton
import triton.language as tl


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
