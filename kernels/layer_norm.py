"""Layer normalization and what stands around it in a transformer, in one pass.

    h = skip + D(x)                                     D: inverted dropout, its mask drawn again in backward
    y = f(xhat w + b + residual)                        xhat = (h - mean) rstd over each row
                                                        mean = sum(h) / C,  rstd = 1 / sqrt(sum((h - mean)^2) / C + eps)

Plain layer normalization (Ba, Kiros and Hinton 2016) is h = x, f the identity and no residual. Backward, with
g = f'(...) dy:

    dh' = dh + rstd (w g - mean(w g) - xhat mean(w g xhat))     dskip = dh',  dx = D'(dh'),  dresidual = g
    dw  = sum over rows of g xhat,  db = sum over rows of g

Every tensor is ``rows`` of ``vectors`` x VECTOR columns. Cost in accesses of a tensor of that size (e bytes an element
each), and C the columns:

                                    forward                              backward
    layer_norm, with activation     2  (x; y)                            3  (dy, x; dx)
      with residual                 3  (x, residual; y)                  3, with activation 5 (and residual; dresidual)
    dropout + add + layer_norm      4  (x, skip; h, y)                   4 (dy, h; dx, dskip), 5 with dh
      without dropout               4                                    3 (dx is dskip), 4 with dh
    rows too long for weight sums   -                                    2 more: ``backward_columns`` reads h and dy

What is kept is h (or x) and two fp32 numbers a row, never xhat. The statistics take two passes over registers, mean
first and then the squares of what is centred: E[h^2] - mean^2 would lose every digit at a mean of 1e4.

``forward`` and ``backward`` hold whole rows in registers, up to 64 KiB, so every value is read once. Longer rows go
through ``forward_long`` and ``backward_long`` in chunks, twice: the second read comes from the L2, which holds the
rows that are in flight (132 programs x 1 MiB would no longer fit, and cost an access more). ``backward`` is a bounded
number of programs that walk down the rows and keep the sums of dw and db in registers: they leave as one fp32 row a
program, which ``sum_partials`` adds in a fixed order. So no result depends on the order in which programs run.

The plain twin is plain/layer_norm.py. What this one does otherwise:
- Sums for dw and db stay in registers over many rows. The plain one writes a row of each for every row, in fp32, and
  torch reads them again: 8 accesses more where activations have 16 bits.
- Dropout, addition, activation and residual in the same pass: at least two accesses less for each.
- Short rows share a program, long ones go through it in chunks; the next rows load while these are computed.
- Pairs of elements in one instruction on Blackwell, conversions of bf16 in one instead of one and a half.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import activation
from .fastmath import INTERPRETED, add, difference, fma, mul, total, upcast
from .philox import lanes
from .ptxas import rounded_product, terms

# Numbers that change from call to call. Rows begin on 16 bytes without a kernel of their own: columns are written as
# vectors * plan.vector.
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "threshold", "rows", "vectors")


class Forward(NamedTuple):
    """Pointers to fp64, fp32, fp16 or bf16 [rows, columns], contiguous."""

    x: tl.tensor
    skip: tl.tensor  # or None
    h: tl.tensor  # None where it is x
    residual: tl.tensor  # or None
    y: tl.tensor
    statistics: tl.tensor  # fp32 (fp64 for fp64 tensors) [2, rows]: mean and rstd


class Backward(NamedTuple):
    """Pointers to what the backward pass reads, as above."""

    dy: tl.tensor
    dh: tl.tensor  # the gradient of h as a result, or None
    h: tl.tensor  # forward's h, or its x where that is h
    residual: tl.tensor  # None also where f is the identity, like the bias: nothing depends on them then
    statistics: tl.tensor


class Gradients(NamedTuple):
    """Pointers to [rows, columns]; None where not wanted."""

    dx: tl.tensor
    dskip: tl.tensor
    dresidual: tl.tensor


class Affine(NamedTuple):
    """Pointers to [columns], or None; and what is loaded from them, [1, columns]."""

    weight: tl.tensor
    bias: tl.tensor


class Sums(NamedTuple):
    """Pointers to the sums over the rows of each program, fp32 (fp64) [programs, columns]; None where not wanted."""

    dweight: tl.tensor
    dbias: tl.tensor


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    drop: bool  # D is not the identity
    activation: str | None
    rows: int  # of a tile; 1 for rows that do not fit in registers
    columns: int  # of a tile: a whole row, or a chunk of a long one
    vector: int  # elements of a 16-byte access, or what divides a row
    even_rows: bool  # no tile has rows outside the tensor
    even_columns: bool
    wide: bool  # 64-bit indices, for 2^31 elements and more


class Draw(NamedTuple):
    """What dropout draws its mask from."""

    seed_ptr: tl.tensor  # int64 [1], or None where the seed comes as a number
    seed: tl.tensor
    offset: tl.tensor
    threshold: tl.tensor  # round(p 2^16)
    scale: tl.tensor


class Elements(NamedTuple):
    """The elements of a tile: base + lane."""

    base: tl.tensor  # one number a tile
    lane: tl.tensor
    in_rows: tl.tensor  # which rows and columns exist
    in_columns: tl.tensor
    inside: tl.tensor


# --- tiles ------------------------------------------------------------------------------------------------


@triton.jit
def _index(number, plan: tl.constexpr):
    """An element count in the type of element indices: 64 bits only where the tensor needs them."""
    return number.to(tl.int64) if plan.wide else number


@triton.jit
def _elements(first_row, first_column, rows, columns, plan: tl.constexpr):
    row = tl.arange(0, plan.rows)[:, None]
    column = tl.arange(0, plan.columns)[None, :]
    in_rows = tl.full([1, 1], True, tl.int1) if plan.even_rows else first_row + row < rows
    in_columns = tl.full([1, 1], True, tl.int1) if plan.even_columns else first_column + column < columns
    return Elements(
        first_row * columns + first_column, row * columns + column, in_rows, in_columns, in_rows & in_columns
    )


@triton.jit
def _zeros(dtype, plan: tl.constexpr):
    ROWS: tl.constexpr = plan.rows
    COLUMNS: tl.constexpr = plan.columns
    return tl.zeros([ROWS, COLUMNS], dtype)


@triton.jit
def _stored(ptr, at):
    """Activations, which are read once (or once more from the L2): they need not stay in the L1."""
    return tl.load(ptr + at.base + at.lane, mask=at.inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _store(ptr, at, value):
    tl.store(ptr + at.base + at.lane, value.to(ptr.dtype.element_ty), mask=at.inside)


@triton.jit
def _load_affine(affine, first_column, in_columns, like_ptr, plan: tl.constexpr):
    """Weight and bias of some columns, which all programs of a multiprocessor share; 1 and 0 [1, 1] without."""
    column = first_column + tl.arange(0, plan.columns)[None, :]
    if affine.weight is None:
        weight = tl.full([1, 1], 1.0, like_ptr.dtype.element_ty)
    else:
        weight = upcast(
            tl.load(affine.weight + column, mask=in_columns, other=0.0, eviction_policy="evict_last")
        )
    if affine.bias is None:
        bias = tl.full([1, 1], 0.0, like_ptr.dtype.element_ty)
    else:
        bias = upcast(tl.load(affine.bias + column, mask=in_columns, other=0.0, eviction_policy="evict_last"))
    return Affine(weight, bias)


@triton.jit
def _dropout(v, draw, at, columns, plan: tl.constexpr):
    """D(v) / scale, and the scale.

    The selection comes first: behind the product, LLVM selects in 16 bits, which is twice the work.
    """
    ROWS: tl.constexpr = plan.rows
    COLUMNS: tl.constexpr = plan.columns
    seed = draw.seed
    if draw.seed_ptr is not None:
        seed = tl.load(draw.seed_ptr)
    vector = at.base // plan.vector + tl.arange(0, COLUMNS // plan.vector)[None, :]
    vector += tl.arange(0, ROWS)[:, None] * (columns // plan.vector)
    drawn = tl.reshape(lanes(vector, seed, draw.offset, plan.vector), [ROWS, COLUMNS])
    kept = tl.where(drawn >= (draw.threshold.to(tl.uint32) << 16), v, 0.0)
    return kept, tl.full([1, 1], draw.scale, v.dtype)


# --- forward ----------------------------------------------------------------------------------------------


@triton.jit
def _hidden(tensors, draw, at, columns, plan: tl.constexpr):
    """h = skip + D(x), written where it is not x itself, and as rounded as it was written."""
    h = upcast(_stored(tensors.x, at))
    if plan.drop:
        h, scale = _dropout(h, draw, at, columns, plan)
        # Where nothing is added next, the mean is: a sum over lanes, which must not take in the product.
        h = rounded_product(h, scale) if tensors.skip is None else mul(h, scale)
    if tensors.skip is not None:
        h = total(_stored(tensors.skip, at), h)
    if tensors.h is not None:
        stored = h.to(tensors.h.dtype.element_ty)
        tl.store(tensors.h + at.base + at.lane, stored, mask=at.inside)
        h = upcast(stored)
    return h


@triton.jit
def _normalized(ptr, at, mean, rstd):
    """xhat = (h - mean) rstd."""
    return mul(difference(_stored(ptr, at), mean), rstd)


@triton.jit
def _write_output(xhat, affine, tensors, at, plan: tl.constexpr):
    """y = f(xhat w + b + residual)."""
    ACTIVATION: tl.constexpr = plan.activation
    v = fma(xhat, affine.weight, affine.bias)
    if tensors.residual is not None:
        v = total(_stored(tensors.residual, at), v)
    _store(tensors.y, at, activation.forward(v, ACTIVATION, tensors.y.dtype.element_ty))


@triton.jit
def _write_statistics(ptr, first_row, rows, in_rows, mean, rstd, plan: tl.constexpr):
    row = first_row + tl.arange(0, plan.rows)[:, None]
    tl.store(ptr + row, mean, mask=in_rows)
    tl.store(ptr + rows + row, rstd, mask=in_rows)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward(
    tensors: Forward,
    affine: Affine,
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,
    scale: tl.float64,
    eps: tl.float64,
    rows,
    vectors,  # a row
    plan: tl.constexpr,
):
    """Some whole rows a program; grid: (row blocks,)."""
    columns = _index(vectors, plan) * plan.vector
    first_row = _index(tl.program_id(0), plan) * plan.rows
    at = _elements(first_row, 0, rows, columns, plan)
    h = _hidden(tensors, Draw(seed_ptr, seed, offset, threshold, scale), at, columns, plan)
    share = 1.0 / columns.to(h.dtype)
    mean = rounded_product(tl.sum(h, 1, keep_dims=True), share)  # as it is stored: a constant row is zero
    centred = add(h, -mean)
    if not plan.even_columns:
        centred = tl.where(at.in_columns, centred, 0.0)
    variance = tl.sum(terms(centred, centred, 1, plan.vector), 1, keep_dims=True) * share
    rstd = tl.rsqrt(variance + tl.full([1, 1], eps, h.dtype))
    _write_statistics(tensors.statistics, first_row, rows, at.in_rows, mean, rstd, plan)
    loaded = _load_affine(affine, 0, at.in_columns, tensors.statistics, plan)
    _write_output(mul(centred, rstd), loaded, tensors, at, plan)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_long(
    tensors: Forward, affine: Affine,
    seed_ptr, seed: tl.int64, offset: tl.int64, threshold: tl.int32, scale: tl.float64, eps: tl.float64,
    rows, vectors, plan: tl.constexpr,
):  # fmt: skip
    """``forward`` for rows that do not fit in registers, one a program, in chunks of ``plan.columns``.

    Every lane of a chunk keeps mean and squares of its own columns (Welford 1962); they are merged once, at the
    end (Chan, Golub and LeVeque 1983).
    """
    columns = _index(vectors, plan) * plan.vector
    row = _index(tl.program_id(0), plan)
    draw = Draw(seed_ptr, seed, offset, threshold, scale)
    lane_mean = _zeros(tensors.statistics.dtype.element_ty, plan)
    lane_squares = tl.zeros_like(lane_mean)
    count = tl.zeros([1, 1], lane_mean.dtype)
    first_column = tl.full([], 0, tl.int64 if plan.wide else tl.int32)
    while first_column < columns:
        at = _elements(row, first_column, rows, columns, plan)
        h = _hidden(tensors, draw, at, columns, plan)
        count += 1.0
        distance = h - lane_mean
        if not plan.even_columns:
            distance = tl.where(at.in_columns, distance, 0.0)
        lane_mean += distance * (1.0 / count)
        lane_squares += distance * (h - lane_mean)
        first_column += plan.columns

    share = 1.0 / columns.to(lane_mean.dtype)
    lane = tl.arange(0, plan.columns)[None, :]
    lane_count = ((columns - lane + plan.columns - 1) // plan.columns).to(lane_mean.dtype)
    mean = rounded_product(tl.sum(terms(lane_mean, lane_count, 1, plan.vector), 1, keep_dims=True), share)
    distance = lane_mean - mean
    variance = tl.sum(lane_squares + distance * distance * lane_count, 1, keep_dims=True) * share
    rstd = tl.rsqrt(variance + tl.full([1, 1], eps, variance.dtype))
    _write_statistics(tensors.statistics, row, rows, tl.full([1, 1], True, tl.int1), mean, rstd, plan)

    tl.debug_barrier()  # another thread may read a part of h than the one that wrote it
    first_column = tl.full([], 0, tl.int64 if plan.wide else tl.int32)
    while first_column < columns:
        at = _elements(row, first_column, rows, columns, plan)
        xhat = _normalized(tensors.x if tensors.h is None else tensors.h, at, mean, rstd)
        loaded = _load_affine(affine, first_column, at.in_columns, tensors.statistics, plan)
        _write_output(xhat, loaded, tensors, at, plan)
        first_column += plan.columns


# --- backward ---------------------------------------------------------------------------------------------


@triton.jit
def _read_statistics(ptr, first_row, rows, in_rows, plan: tl.constexpr):
    """Mean and rstd of some rows [plan.rows, 1]; 0 outside, where xhat has to be finite."""
    row = first_row + tl.arange(0, plan.rows)[:, None]
    return tl.load(ptr + row, mask=in_rows, other=0.0), tl.load(ptr + rows + row, mask=in_rows, other=0.0)


@triton.jit
def _gradient(xhat, affine, tensors, at, plan: tl.constexpr):
    """g = f'(xhat w + b + residual) dy."""
    ACTIVATION: tl.constexpr = plan.activation
    g = upcast(_stored(tensors.dy, at)).to(xhat.dtype)
    if ACTIVATION is not None:
        v = fma(xhat, affine.weight, affine.bias)
        if tensors.residual is not None:
            v = total(_stored(tensors.residual, at), v)
        g = activation.backward(g, v, ACTIVATION, tensors.dy.dtype.element_ty)
    return g


@triton.jit
def _centred_gradient(wg, xhat, mean_wg, mean_wg_xhat, rstd):
    """dh = rstd (w g - mean(w g) - xhat mean(w g xhat))."""
    # One instruction more than with rstd multiplied out, and a register less.
    return mul(add(wg, fma(xhat, -mean_wg_xhat, -mean_wg)), rstd)


@triton.jit
def _write_gradients(dh, g, dh_ptr, gradients, draw, at, columns, plan: tl.constexpr):
    """What follows from the gradients behind (g) and before (dh) the normalization."""
    if gradients.dresidual is not None:
        _store(gradients.dresidual, at, g)
    if dh_ptr is not None:
        dh = total(_stored(dh_ptr, at), dh)
    if gradients.dskip is not None:
        _store(gradients.dskip, at, dh)
    if gradients.dx is not None:
        if plan.drop:
            dh, scale = _dropout(dh, draw, at, columns, plan)
            dh = mul(dh, scale)
        _store(gradients.dx, at, dh)


@triton.jit
def _backward_rows(
    block, dweight, dbias, tensors, gradients, affine, draw, rows, columns, plan: tl.constexpr
):
    """All gradients of one block of rows. Returns the sums over the rows with what the block adds to them."""
    first_row = _index(block, plan) * plan.rows
    at = _elements(first_row, 0, rows, columns, plan)
    mean, rstd = _read_statistics(tensors.statistics, first_row, rows, at.in_rows, plan)
    xhat = _normalized(tensors.h, at, mean, rstd)
    g = _gradient(xhat, affine, tensors, at, plan)
    # Columns outside count nothing: g is 0 there.
    wg = terms(g, affine.weight, 1, used=True)
    share = 1.0 / columns.to(wg.dtype)
    mean_wg = tl.sum(wg, 1, keep_dims=True) * share
    mean_wg_xhat = tl.sum(terms(wg, xhat, 1), 1, keep_dims=True) * share
    dh = _centred_gradient(wg, xhat, mean_wg, mean_wg_xhat, rstd)
    _write_gradients(dh, g, tensors.dh, gradients, draw, at, columns, plan)
    return fma(g, xhat, dweight), add(dbias, g)


@triton.jit
def _write_sums(sums, program, column, columns, dweight, dbias):
    partial = program.to(tl.int64) * columns + column
    if sums.dweight is not None:
        tl.store(sums.dweight + partial, tl.sum(dweight, 0), mask=column < columns)
    if sums.dbias is not None:
        tl.store(sums.dbias + partial, tl.sum(dbias, 0), mask=column < columns)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward(
    tensors: Backward, gradients: Gradients, sums: Sums, affine: Affine,
    seed_ptr, seed: tl.int64, offset: tl.int64, threshold: tl.int32, scale: tl.float64,
    rows, vectors, plan: tl.constexpr,
):  # fmt: skip
    """All gradients. A program walks down the rows, one block in every ``programs``; grid: (programs,)."""
    columns = _index(vectors, plan) * plan.vector
    draw = Draw(seed_ptr, seed, offset, threshold, scale)
    column = tl.arange(0, plan.columns)
    in_columns = tl.full([1, 1], True, tl.int1) if plan.even_columns else column[None, :] < columns
    loaded = _load_affine(affine, 0, in_columns, tensors.statistics, plan)
    # A thread adds up each of its positions in the tile; the rows of the tile are added once, at the end.
    dweight = _zeros(tensors.statistics.dtype.element_ty, plan)
    dbias = tl.zeros_like(dweight)
    blocks = tl.cdiv(rows, plan.rows)
    if INTERPRETED:
        # The same loop for the interpreter of Triton 3.6, which cannot count one with numpy 2.4.
        block = tl.program_id(0)
        while block < blocks:
            dweight, dbias = _backward_rows(
                block, dweight, dbias, tensors, gradients, loaded, draw, rows, columns, plan
            )
            block += tl.num_programs(0)
    else:
        # Two stages: the next rows are on their way to shared memory while these are computed.
        for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=2):
            dweight, dbias = _backward_rows(
                block, dweight, dbias, tensors, gradients, loaded, draw, rows, columns, plan
            )
    _write_sums(sums, tl.program_id(0), column, columns, dweight, dbias)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_long(
    tensors: Backward, gradients: Gradients, affine: Affine,
    seed_ptr, seed: tl.int64, offset: tl.int64, threshold: tl.int32, scale: tl.float64,
    rows, vectors, plan: tl.constexpr,
):  # fmt: skip
    """``backward`` for rows that do not fit in registers, one a program, without the sums over rows."""
    columns = _index(vectors, plan) * plan.vector
    row = _index(tl.program_id(0), plan)
    draw = Draw(seed_ptr, seed, offset, threshold, scale)
    mean, rstd = _read_statistics(tensors.statistics, row, rows, tl.full([1, 1], True, tl.int1), plan)
    sum_wg = _zeros(tensors.statistics.dtype.element_ty, plan)
    sum_wg_xhat = tl.zeros_like(sum_wg)
    first_column = tl.full([], 0, tl.int64 if plan.wide else tl.int32)
    while first_column < columns:
        at = _elements(row, first_column, rows, columns, plan)
        xhat = _normalized(tensors.h, at, mean, rstd)
        loaded = _load_affine(affine, first_column, at.in_columns, tensors.statistics, plan)
        wg = mul(_gradient(xhat, loaded, tensors, at, plan), loaded.weight)
        sum_wg = add(sum_wg, wg)
        sum_wg_xhat = fma(wg, xhat, sum_wg_xhat)
        first_column += plan.columns

    share = 1.0 / columns.to(sum_wg.dtype)
    mean_wg = tl.sum(sum_wg, 1, keep_dims=True) * share
    mean_wg_xhat = tl.sum(sum_wg_xhat, 1, keep_dims=True) * share
    first_column = tl.full([], 0, tl.int64 if plan.wide else tl.int32)
    while first_column < columns:
        at = _elements(row, first_column, rows, columns, plan)
        xhat = _normalized(tensors.h, at, mean, rstd)
        loaded = _load_affine(affine, first_column, at.in_columns, tensors.statistics, plan)
        g = _gradient(xhat, loaded, tensors, at, plan)
        dh = _centred_gradient(mul(g, loaded.weight), xhat, mean_wg, mean_wg_xhat, rstd)
        _write_gradients(dh, g, tensors.dh, gradients, draw, at, columns, plan)
        first_column += plan.columns


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_columns(tensors: Backward, sums: Sums, affine: Affine, rows, vectors, plan: tl.constexpr):
    """The sums of ``backward`` alone, a block of columns a program; grid: (column blocks, row programs)."""
    columns = _index(vectors, plan) * plan.vector
    first_column = _index(tl.program_id(0), plan) * plan.columns
    column = first_column + tl.arange(0, plan.columns)
    dweight = _zeros(tensors.statistics.dtype.element_ty, plan)
    dbias = tl.zeros_like(dweight)
    in_columns = tl.full([1, 1], True, tl.int1) if plan.even_columns else column[None, :] < columns
    loaded = _load_affine(affine, first_column, in_columns, tensors.statistics, plan)
    first_row = _index(tl.program_id(1), plan) * plan.rows
    while first_row < rows:
        at = _elements(first_row, first_column, rows, columns, plan)
        mean, rstd = _read_statistics(tensors.statistics, first_row, rows, at.in_rows, plan)
        xhat = _normalized(tensors.h, at, mean, rstd)
        g = _gradient(xhat, loaded, tensors, at, plan)
        dweight = fma(g, xhat, dweight)
        dbias = add(dbias, g)
        first_row += _index(tl.num_programs(1), plan) * plan.rows
    _write_sums(sums, tl.program_id(1), column, columns, dweight, dbias)
