"""Dropout and what stands around it in a network, in one pass: y = D(f(x + bias)) + residual.

    D(v) = scale v + kept_shift   where lane >= threshold      (kept,    probability 1 - threshold / 2^16)
           dropped_value          elsewhere

Inverted dropout (Srivastava et al. 2014) is scale = 2^16 / (2^16 - threshold) without the two constants, which
alpha dropout (Klambauer et al. 2017) adds. The mask is never stored: the backward pass draws it again.

Tensors are taken in memory order as ``rows`` of ``vectors`` x VECTOR columns, so one kernel serves every layout:

    no bias                              one row
    bias along the innermost dimension   a bias for each COLUMN        (linear layers, channels_last)
    bias along any other dimension       a bias for each ROW           (contiguous convolutions)
    mask of a channel or a sample        one lane for each ROW, or lanes of a smaller tensor whose rows
                                         ``mask_repeat`` rows share    (channels_last)

Cost, e bytes an element: forward reads x (+ residual) and writes y, 2e (3e); backward reads dy (+ x, where the
activation needs it) and writes dx, 2e (3e). A mask of channels or samples skips the reads of what it drops:
e (1 - p) read. The bias is read once a tile; its gradient leaves as one partial sum a program.
Arithmetic: 12 (16-bit) or 17 (fp32) instructions an element for copy and mask, where the memory of an H100 leaves
time for 38 or 76; an activation adds 1 to 14. ``fastreg inspect`` counts them.

Accesses are 16 bytes wide: a thread holds VECTOR neighbouring elements, and ``philox.lanes`` makes their random
bits in that same thread. A program is one tile, with many tiles in flight on a multiprocessor; only
``backward_bias_columns`` loops, to leave few partial sums.
"""

import triton
import triton.language as tl

from . import activation
from .fastmath import add, fma, mul, total, upcast
from .philox import lanes
from .ptxas import terms

# Numbers that change from call to call: a kernel of its own for those that divide by 16 would gain nothing.
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "threshold", "tail")


@triton.jit
def _tile(shape, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """First row and first column of this program's tile."""
    rows, columns, _, _, _ = shape
    block = tl.program_id(0)
    if rows is None:
        return 0, _index(block, WIDE) * BLOCK_COLUMNS
    else:
        # In 32 bits, as the grid is: a division of 64 bits costs 70 instructions.
        column_blocks = tl.cdiv(columns, BLOCK_COLUMNS).to(tl.int32)
        row_block = block // column_blocks
        column_block = block - row_block * column_blocks
        return _index(row_block, WIDE) * BLOCK_ROWS, _index(column_block, WIDE) * BLOCK_COLUMNS


@triton.jit
def _index(number, WIDE: tl.constexpr):
    """An element count in the type of element indices: 64 bits only where the tensor needs them."""
    return number.to(tl.int64) if WIDE else number


@triton.jit
def _positions(
    first_row,
    first_column,
    shape,
    limit,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Of each position of a tile: row, column, element index behind the tile's first, and is it in the tensor."""
    rows, columns, _, _, _ = shape
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if EVEN:
        inside = tl.full([1, 1], True, tl.int1)
    elif rows is None:
        inside = first_column + column < limit
    else:
        inside = (first_column + column < limit) & (first_row + row < rows)
    if rows is None:
        return row, column, first_column, column, inside
    else:
        return row, column, first_row * columns + first_column, row * columns + column, inside


@triton.jit
def _keep(
    draw, first_row, first_column, shape,
    MASK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile stay: bool [BLOCK_ROWS, BLOCK_COLUMNS], or [BLOCK_ROWS, 1] for MASK == "row"."""
    seed, offset, threshold = draw
    rows, columns, mask_repeat, _, _ = shape
    vector = first_column // VECTOR + tl.arange(0, BLOCK_COLUMNS // VECTOR)[None, :]
    if rows is not None:
        mask_row = (first_row + tl.arange(0, BLOCK_ROWS)[:, None]) // mask_repeat
        vector += mask_row * (columns // VECTOR)
    if MASK == "row":
        drawn = tl.reshape(lanes(mask_row, seed, offset, 1), [BLOCK_ROWS, 1])
    else:
        drawn = tl.reshape(lanes(vector, seed, offset, VECTOR), [BLOCK_ROWS, BLOCK_COLUMNS])
    return drawn >= (threshold.to(tl.uint32) << 16)


@triton.jit
def _constant(number, like):
    """A number that came as fp64 in the dtype that the tile computes in."""
    return tl.full([1, 1], number, like.dtype)


@triton.jit
def _add_bias(v, bias_ptr, first_row, row, first_column, column, shape, limit, BIAS: tl.constexpr):
    _, _, _, bias_repeat, bias_size = shape
    if BIAS == "columns":
        bias = tl.load(bias_ptr + first_column + column, mask=first_column + column < limit, other=0.0)
    else:
        bias = tl.load(bias_ptr + (first_row + row) // bias_repeat % bias_size)
    return add(v, upcast(bias).to(v.dtype))


@triton.jit
def _forward_tile(
    tensors, draw, constants, first_row, first_column, shape, limit,
    MASK: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SHIFTED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    x_ptr, bias_ptr, residual_ptr, y_ptr = tensors
    scale, kept_shift, dropped_value = constants
    row, column, first, element, inside = _positions(
        first_row, first_column, shape, limit, EVEN, BLOCK_ROWS, BLOCK_COLUMNS
    )
    wanted = inside
    if MASK is not None:
        keep = _keep(draw, first_row, first_column, shape, MASK, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR)
        if MASK == "row":
            wanted = inside & keep  # what is dropped is not read

    x = tl.load(x_ptr + first + element, mask=wanted, other=0.0)
    v = upcast(x)
    if bias_ptr is not None:
        v = _add_bias(v, bias_ptr, first_row, row, first_column, column, shape, limit, BIAS)
    y = activation.forward(v, ACTIVATION, x.dtype)
    if SHIFTED:
        kept = fma(y, _constant(scale, y), _constant(kept_shift, y))
        y = tl.where(keep, kept, _constant(dropped_value, y))
    else:
        if MASK is not None:
            # Selected before it is scaled: behind the product LLVM selects in 16 bits, which is twice the work.
            y = tl.where(keep, y, 0.0)
        y = mul(y, _constant(scale, y))
    if residual_ptr is not None:
        y = total(tl.load(residual_ptr + first + element, mask=inside, other=0.0), y)
    tl.store(y_ptr + first + element, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward(
    x_ptr,  # fp64, fp32, fp16 or bf16 [rows, columns]: a dense tensor in memory order
    bias_ptr,  # any of those [bias_size], or None
    residual_ptr,  # any of those [rows, columns], or None
    y_ptr,  # any of those [rows, columns]
    seed_ptr,  # int64 [1], or None where the seed comes as a number
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,  # round(p 2^16)
    scale: tl.float64,
    kept_shift: tl.float64,
    dropped_value: tl.float64,
    rows,  # None where all is one row
    vectors,  # a row
    tail,  # elements behind the last whole vector of the only row (RAGGED)
    mask_repeat,
    bias_repeat,  # rows that share a bias (BIAS == "rows")
    bias_size,
    MASK: tl.constexpr,  # None (nothing is dropped), "element" or "row"
    BIAS: tl.constexpr,  # None, "columns" or "rows"
    ACTIVATION: tl.constexpr,
    SHIFTED: tl.constexpr,  # kept_shift and dropped_value are not 0
    RAGGED: tl.constexpr,
    EVEN: tl.constexpr,  # all tiles are full
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit indices, for 2^31 elements and more
):
    """One tile a program; grid: (row blocks x column blocks,)."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    tensors = (x_ptr, bias_ptr, residual_ptr, y_ptr)
    draw = (seed, offset, threshold)
    constants = (scale, kept_shift, dropped_value)
    # Written as a product, so that the compiler sees that a vector is inside as a whole or not at all.
    columns = _index(vectors, WIDE) * VECTOR
    shape = (rows, columns, mask_repeat, bias_repeat, bias_size)
    first_row, first_column = _tile(shape, BLOCK_ROWS, BLOCK_COLUMNS, WIDE)
    _forward_tile(
        tensors, draw, constants, first_row, first_column, shape, columns,
        MASK, BIAS, ACTIVATION, SHIFTED, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR,
    )  # fmt: skip
    if RAGGED and tl.program_id(0) == 0:
        _forward_tile(
            tensors, draw, constants, first_row, columns, shape, columns + tail,
            MASK, BIAS, ACTIVATION, SHIFTED, False, 1, VECTOR, VECTOR,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    tensors, draw, scale, first_row, first_column, shape, limit,
    MASK: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes dx and returns it, unrounded: it is also the bias gradient before the sum."""
    dy_ptr, x_ptr, bias_ptr, dx_ptr = tensors
    row, column, first, element, inside = _positions(
        first_row, first_column, shape, limit, EVEN, BLOCK_ROWS, BLOCK_COLUMNS
    )
    wanted = inside
    if MASK is not None:
        keep = _keep(draw, first_row, first_column, shape, MASK, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR)
        if MASK == "row":
            wanted = inside & keep

    dx = upcast(tl.load(dy_ptr + first + element, mask=wanted, other=0.0))
    if x_ptr is not None:
        x = tl.load(x_ptr + first + element, mask=wanted, other=0.0)
        v = upcast(x)
        if bias_ptr is not None:
            v = _add_bias(v, bias_ptr, first_row, row, first_column, column, shape, limit, BIAS)
        dx = activation.backward(dx.to(v.dtype), v, ACTIVATION, x.dtype)
    if MASK is not None:
        dx = tl.where(keep, dx, 0.0)  # behind the activation: a dropped NaN has no gradient
    dx = terms(dx, _constant(scale, dx), 0 if BIAS == "columns" else 1, VECTOR, used=True)
    tl.store(dx_ptr + first + element, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    return dx  # 0 outside the tensor, where dy was read as 0


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward(
    dy_ptr,  # fp64, fp32, fp16 or bf16 [rows, columns], laid out as forward's x
    x_ptr,  # forward's x, or None where f is the identity
    bias_ptr,  # forward's bias, or None where there is none or f is the identity
    dx_ptr,  # any of those [rows, columns]
    partial_ptr,  # fp32 (fp64 for fp64 tensors) [rows, column blocks], or None: sums of dx over columns
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,
    scale: tl.float64,
    rows,
    vectors,
    tail,
    mask_repeat,
    bias_repeat,
    bias_size,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RAGGED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx = f'(x + bias) scale dy where kept, else 0. Arguments and grid as in ``forward``."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    tensors = (dy_ptr, x_ptr, bias_ptr, dx_ptr)
    draw = (seed, offset, threshold)
    columns = _index(vectors, WIDE) * VECTOR
    shape = (rows, columns, mask_repeat, bias_repeat, bias_size)
    first_row, first_column = _tile(shape, BLOCK_ROWS, BLOCK_COLUMNS, WIDE)
    dx = _backward_tile(
        tensors, draw, scale, first_row, first_column, shape, columns,
        MASK, BIAS, ACTIVATION, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR,
    )  # fmt: skip
    if partial_ptr is not None:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
        tl.store(
            partial_ptr + row * column_blocks + first_column // BLOCK_COLUMNS,
            tl.sum(dx, axis=1),
            mask=row < rows,
        )
    if RAGGED and tl.program_id(0) == 0:
        _backward_tile(
            tensors, draw, scale, first_row, columns, shape, columns + tail,
            MASK, BIAS, ACTIVATION, False, 1, VECTOR, VECTOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_bias_columns(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,  # fp32 (fp64 for fp64 tensors) [row programs, columns]: sums of dx over the rows of a program
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,
    scale: tl.float64,
    rows,
    vectors,
    mask_repeat,
    bias_size,
    MASK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``backward`` for a bias that varies along the columns. Grid: (column blocks, row programs).

    A program walks down its column block, one tile in every ``row programs``, and keeps the sum in registers.
    """
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    tensors = (dy_ptr, x_ptr, bias_ptr, dx_ptr)
    draw = (seed, offset, threshold)
    columns = _index(vectors, WIDE) * VECTOR
    shape = (rows, columns, mask_repeat, 1, bias_size)
    first_column = _index(tl.program_id(0), WIDE) * BLOCK_COLUMNS
    total = tl.zeros([BLOCK_COLUMNS], partial_ptr.dtype.element_ty)
    first_row = _index(tl.program_id(1), WIDE) * BLOCK_ROWS
    while first_row < rows:
        dx = _backward_tile(
            tensors, draw, scale, first_row, first_column, shape, columns,
            MASK, "columns", ACTIVATION, EVEN, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR,
        )  # fmt: skip
        total += tl.sum(dx, axis=0)
        first_row += _index(tl.num_programs(1), WIDE) * BLOCK_ROWS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * columns + column, total, mask=column < columns)
