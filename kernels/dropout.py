"""Dropout and what stands around it in a network, in one pass: y = D(f(x + bias)) + residual.

    D(v) = scale v + kept_shift   where lane >= threshold      (kept,    probability 1 - threshold / 2^16)
           dropped_value          elsewhere

Inverted dropout (Srivastava et al. 2014) is scale = 2^16 / (2^16 - threshold) without the two constants, which
alpha dropout (Klambauer et al. 2017) adds. The mask is never stored: the backward pass draws it again.

Tensors are taken in memory order as ``rows`` of ``vectors`` x ``vector`` columns, so one kernel serves every layout:

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

Accesses are 16 bytes wide: a thread holds ``vector`` neighbouring elements, and ``philox.lanes`` makes their random
bits in that same thread. A program is one tile, with many tiles in flight on a multiprocessor; only
``backward_bias_columns`` loops, to leave few partial sums.

The plain twin is plain/dropout.py. What this one does otherwise, step by step and with the instructions that each step
saves (46.8 an element at first, 11.6 here): ``python -m bench lesson``, printed in README.md.
- Vectors of 16 bytes, one call of Philox for all lanes of a vector, integers compared and not floats.
- Bias, activation and residual in the same pass: each takes two accesses of the tensor away.
- Any dense layout and masks of rows, which skip the reads of what they drop.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import activation
from .fastmath import add, fma, mul, total, upcast
from .philox import lanes
from .ptxas import terms
from .structs import of_constants

# Numbers that change from call to call: a kernel of its own for those that divide by 16 would gain nothing.
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "threshold", "tail")


class Forward(NamedTuple):
    """Pointers to fp64, fp32, fp16 or bf16 [rows, columns]: dense tensors in memory order."""

    x: tl.tensor
    bias: tl.tensor  # any of those [bias_size], or None
    residual: tl.tensor  # or None
    y: tl.tensor


class Backward(NamedTuple):
    """Pointers to tensors laid out as forward's x."""

    dy: tl.tensor
    x: tl.tensor  # forward's, or None where f is the identity
    bias: tl.tensor  # forward's, or None where there is none or f is the identity
    dx: tl.tensor
    partial: tl.tensor  # sums of dx for the bias, fp32 (fp64 for fp64 tensors), or None


class View(NamedTuple):
    """The tensor as a kernel is given it: integers."""

    rows: tl.tensor  # None where all is one row
    vectors: tl.tensor  # a row
    mask_repeat: tl.tensor  # rows that share a mask
    bias_repeat: tl.tensor  # rows that share a bias, one after another
    bias_size: tl.tensor


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    mask: str | None  # None (nothing is dropped), "element" or "row"
    bias: str | None  # None, "columns" or "rows": what it varies along
    activation: str | None
    rows: int  # of a tile
    columns: int
    vector: int  # elements of a 16-byte access, or what divides a row
    even: bool  # all tiles are full
    wide: bool  # 64-bit indices, for 2^31 elements and more
    ragged: bool = False  # the only row has a tail behind its last whole vector
    shifted: bool = False  # what is kept gets an addend, and what is dropped a value other than 0


class Shape(NamedTuple):
    """The view, in elements."""

    rows: tl.tensor
    columns: tl.tensor
    mask_repeat: tl.tensor
    bias_repeat: tl.tensor
    bias_size: tl.tensor


class Draw(NamedTuple):
    seed: tl.tensor
    offset: tl.tensor
    threshold: tl.tensor  # round(p 2^16)


class Constants(NamedTuple):
    """y = scale f(v) + kept_shift where kept, else dropped_value."""

    scale: tl.tensor
    kept_shift: tl.tensor
    dropped_value: tl.tensor


class Elements(NamedTuple):
    """The elements of a tile: base + lane."""

    row: tl.tensor
    column: tl.tensor
    base: tl.tensor
    lane: tl.tensor
    inside: tl.tensor


@triton.constexpr_function
def _tail_of(plan):
    """The plan for the tail: one vector, masked."""
    plan = of_constants(plan, Plan)
    return plan._replace(even=False, rows=1, columns=plan.vector)


@triton.jit
def _first_of_tile(shape, plan: tl.constexpr):
    """First row and first column of this program's tile."""
    block = tl.program_id(0)
    if shape.rows is None:
        return 0, _index(block, plan) * plan.columns
    else:
        # In 32 bits, as the grid is: a division of 64 bits costs 70 instructions.
        column_blocks = tl.cdiv(shape.columns, plan.columns).to(tl.int32)
        row_block = block // column_blocks
        column_block = block - row_block * column_blocks
        return _index(row_block, plan) * plan.rows, _index(column_block, plan) * plan.columns


@triton.jit
def _index(number, plan: tl.constexpr):
    """An element count in the type of element indices: 64 bits only where the tensor needs them."""
    return number.to(tl.int64) if plan.wide else number


@triton.jit
def _elements(first_row, first_column, shape, limit, plan: tl.constexpr):
    """limit: columns that exist."""
    row = tl.arange(0, plan.rows)[:, None]
    column = tl.arange(0, plan.columns)[None, :]
    if plan.even:
        inside = tl.full([1, 1], True, tl.int1)
    elif shape.rows is None:
        inside = first_column + column < limit
    else:
        inside = (first_column + column < limit) & (first_row + row < shape.rows)
    if shape.rows is None:
        return Elements(row, column, first_column, column, inside)
    else:
        base = first_row * shape.columns + first_column
        return Elements(row, column, base, row * shape.columns + column, inside)


@triton.jit
def _keep(draw, first_row, first_column, shape, plan: tl.constexpr):
    """Which elements of a tile stay: bool [rows, columns], or [rows, 1] where whole rows are dropped."""
    ROWS: tl.constexpr = plan.rows
    COLUMNS: tl.constexpr = plan.columns
    vector = first_column // plan.vector + tl.arange(0, COLUMNS // plan.vector)[None, :]
    if shape.rows is not None:
        mask_row = (first_row + tl.arange(0, ROWS)[:, None]) // shape.mask_repeat
        vector += mask_row * (shape.columns // plan.vector)
    if plan.mask == "row":
        drawn = tl.reshape(lanes(mask_row, draw.seed, draw.offset, 1), [ROWS, 1])
    else:
        drawn = tl.reshape(lanes(vector, draw.seed, draw.offset, plan.vector), [ROWS, COLUMNS])
    return drawn >= (draw.threshold.to(tl.uint32) << 16)


@triton.jit
def _constant(number, like):
    """A number that came as fp64 in the dtype that the tile computes in."""
    return tl.full([1, 1], number, like.dtype)


@triton.jit
def _add_bias(v, bias_ptr, at, first_row, first_column, shape, limit, plan: tl.constexpr):
    if plan.bias == "columns":
        column = first_column + at.column
        bias = tl.load(bias_ptr + column, mask=column < limit, other=0.0)
    else:
        bias = tl.load(bias_ptr + (first_row + at.row) // shape.bias_repeat % shape.bias_size)
    return add(v, upcast(bias).to(v.dtype))


@triton.jit
def _forward_tile(tensors, draw, constants, first_row, first_column, shape, limit, plan: tl.constexpr):
    ACTIVATION: tl.constexpr = plan.activation
    at = _elements(first_row, first_column, shape, limit, plan)
    wanted = at.inside
    if plan.mask is not None:
        keep = _keep(draw, first_row, first_column, shape, plan)
        if plan.mask == "row":
            wanted = at.inside & keep  # what is dropped is not read

    x = tl.load(tensors.x + at.base + at.lane, mask=wanted, other=0.0)
    v = upcast(x)
    if tensors.bias is not None:
        v = _add_bias(v, tensors.bias, at, first_row, first_column, shape, limit, plan)
    y = activation.forward(v, ACTIVATION, x.dtype)
    if plan.shifted:
        kept = fma(y, _constant(constants.scale, y), _constant(constants.kept_shift, y))
        y = tl.where(keep, kept, _constant(constants.dropped_value, y))
    else:
        if plan.mask is not None:
            # The selection comes first: behind the product, LLVM selects in 16 bits, which is twice the work.
            y = tl.where(keep, y, 0.0)
        y = mul(y, _constant(constants.scale, y))
    if tensors.residual is not None:
        y = total(tl.load(tensors.residual + at.base + at.lane, mask=at.inside, other=0.0), y)
    tl.store(tensors.y + at.base + at.lane, y.to(tensors.y.dtype.element_ty), mask=at.inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward(
    tensors: Forward,
    seed_ptr,  # int64 [1], or None where the seed comes as a number
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,
    scale: tl.float64,
    kept_shift: tl.float64,
    dropped_value: tl.float64,
    view: View,
    tail,  # elements behind the last whole vector of the only row
    plan: tl.constexpr,
):
    """One tile a program; grid: (row blocks x column blocks,)."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    draw = Draw(seed, offset, threshold)
    constants = Constants(scale, kept_shift, dropped_value)
    # Written as a product, so that the compiler sees that a vector is inside as a whole or not at all.
    columns = _index(view.vectors, plan) * plan.vector
    shape = Shape(view.rows, columns, view.mask_repeat, view.bias_repeat, view.bias_size)
    first_row, first_column = _first_of_tile(shape, plan)
    _forward_tile(tensors, draw, constants, first_row, first_column, shape, columns, plan)
    if plan.ragged and tl.program_id(0) == 0:
        _forward_tile(tensors, draw, constants, first_row, columns, shape, columns + tail, _tail_of(plan))


@triton.jit
def _backward_tile(tensors, draw, scale, first_row, first_column, shape, limit, plan: tl.constexpr):
    """Writes dx and returns it, unrounded: it is also the bias gradient before the sum."""
    ACTIVATION: tl.constexpr = plan.activation
    at = _elements(first_row, first_column, shape, limit, plan)
    wanted = at.inside
    if plan.mask is not None:
        keep = _keep(draw, first_row, first_column, shape, plan)
        if plan.mask == "row":
            wanted = at.inside & keep

    dx = upcast(tl.load(tensors.dy + at.base + at.lane, mask=wanted, other=0.0))
    if tensors.x is not None:
        x = tl.load(tensors.x + at.base + at.lane, mask=wanted, other=0.0)
        v = upcast(x)
        if tensors.bias is not None:
            v = _add_bias(v, tensors.bias, at, first_row, first_column, shape, limit, plan)
        dx = activation.backward(dx.to(v.dtype), v, ACTIVATION, x.dtype)
    if plan.mask is not None:
        dx = tl.where(keep, dx, 0.0)  # behind the activation: a dropped NaN has no gradient
    dx = terms(dx, _constant(scale, dx), 0 if plan.bias == "columns" else 1, plan.vector, used=True)
    tl.store(tensors.dx + at.base + at.lane, dx.to(tensors.dx.dtype.element_ty), mask=at.inside)
    return dx  # 0 outside the tensor, where dy was read as 0


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward(
    tensors: Backward,  # partial [rows, column blocks]: sums over columns
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,
    scale: tl.float64,
    view: View,
    tail,
    plan: tl.constexpr,
):
    """dx = f'(x + bias) scale dy where kept, else 0. Arguments and grid as in ``forward``."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    draw = Draw(seed, offset, threshold)
    columns = _index(view.vectors, plan) * plan.vector
    shape = Shape(view.rows, columns, view.mask_repeat, view.bias_repeat, view.bias_size)
    first_row, first_column = _first_of_tile(shape, plan)
    dx = _backward_tile(tensors, draw, scale, first_row, first_column, shape, columns, plan)
    if tensors.partial is not None:
        row = first_row + tl.arange(0, plan.rows)
        column_blocks = tl.cdiv(columns, plan.columns)
        place = row * column_blocks + first_column // plan.columns
        tl.store(tensors.partial + place, tl.sum(dx, axis=1), mask=row < view.rows)
    if plan.ragged and tl.program_id(0) == 0:
        _backward_tile(tensors, draw, scale, first_row, columns, shape, columns + tail, _tail_of(plan))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_bias_columns(
    tensors: Backward,  # partial [row programs, columns]: sums over the rows of a program
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,
    scale: tl.float64,
    view: View,
    plan: tl.constexpr,
):
    """``backward`` for a bias that varies along the columns. Grid: (column blocks, row programs).

    A program walks down its column block, one tile in every ``row programs``, and keeps the sum in registers.
    """
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    COLUMNS: tl.constexpr = plan.columns
    draw = Draw(seed, offset, threshold)
    columns = _index(view.vectors, plan) * plan.vector
    shape = Shape(view.rows, columns, view.mask_repeat, 1, view.bias_size)
    first_column = _index(tl.program_id(0), plan) * COLUMNS
    sums = tl.zeros([COLUMNS], tensors.partial.dtype.element_ty)
    first_row = _index(tl.program_id(1), plan) * plan.rows
    while first_row < view.rows:
        dx = _backward_tile(tensors, draw, scale, first_row, first_column, shape, columns, plan)
        sums += tl.sum(dx, axis=0)
        first_row += _index(tl.num_programs(1), plan) * plan.rows
    column = first_column + tl.arange(0, COLUMNS)
    place = tl.program_id(1).to(tl.int64) * columns + column
    tl.store(tensors.partial + place, sums, mask=column < columns)
