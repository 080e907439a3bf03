"""The last step of a sum that several programs share: each has left a row of partial sums, which are added here.

    result[c] = sum_p partial[p, c]

In a fixed order, so that no result depends on the order in which programs run. Sums are kept in the dtype of the
partial sums, and rounded once, to that of the result.

Cost: the partial sums are read once, a small part of the traffic of the kernels that wrote them. A program takes 32
columns, 128 bytes of a row, and 64 rows at a time.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["programs", "columns"])
def sum_partials(
    partial_ptr,  # fp32 (fp64) [1 or 2, programs, columns]
    first_ptr,  # [columns]: the sum of partial[0] over the programs
    second_ptr,  # [columns]: that of partial[1], or None
    programs,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit indices, for 2^31 partial sums and more
):
    """Grid: (column blocks, 1 or 2)."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    column = tl.program_id(0).to(INDEX) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    row = tl.arange(0, BLOCK_ROWS)[:, None].to(INDEX)
    partial_ptr += tl.program_id(1).to(tl.int64) * programs * columns
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], partial_ptr.dtype.element_ty)
    first_row = tl.full([], 0, tl.int32)
    while first_row < programs:
        inside = (first_row + row < programs) & (column < columns)
        total += tl.load(partial_ptr + (first_row + row) * columns + column, mask=inside, other=0.0)
        first_row += BLOCK_ROWS
    total = tl.sum(total, 0, keep_dims=True)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + column, total.to(first_ptr.dtype.element_ty), mask=column < columns)
    elif second_ptr is not None:
        tl.store(second_ptr + column, total.to(second_ptr.dtype.element_ty), mask=column < columns)
