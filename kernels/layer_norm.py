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
"""

import triton
import triton.language as tl

from . import activation
from .fastmath import INTERPRETED, add, difference, fma, mul, total, upcast
from .philox import lanes
from .ptxas import rounded_product, terms

# Numbers that change from call to call. The rows start on 16 bytes without a kernel of their own: columns are
# written as vectors * VECTOR.
NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "threshold", "rows", "vectors")


@triton.jit
def _index(number, WIDE: tl.constexpr):
    """An element count in the type of element indices: 64 bits only where the tensor needs them."""
    return number.to(tl.int64) if WIDE else number


@triton.jit
def _tile(
    first_row, first_column, shape,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile: the index of its first element, the others' behind it, and which rows and columns there are."""
    rows, columns = shape
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    in_rows = tl.full([1, 1], True, tl.int1) if EVEN_ROWS else first_row + row < rows
    in_columns = tl.full([1, 1], True, tl.int1) if EVEN_COLUMNS else first_column + column < columns
    return first_row * columns + first_column, row * columns + column, in_rows, in_columns


@triton.jit
def _stored(ptr, first, element, inside):
    """Activations, which are read once (or once more from the L2): they need not stay in the L1."""
    return tl.load(ptr + first + element, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load(ptr, first, element, inside):
    return upcast(_stored(ptr, first, element, inside))


@triton.jit
def _normalized(ptr, first, element, inside, mean, rstd):
    """xhat = (h - mean) rstd."""
    return mul(difference(_stored(ptr, first, element, inside), mean), rstd)


@triton.jit
def _parameters(weight_ptr, bias_ptr, first_column, in_columns, like_ptr, BLOCK_COLUMNS: tl.constexpr):
    """Weight and bias of some columns [1, BLOCK_COLUMNS], which all programs of a multiprocessor share; 1 and 0
    [1, 1] where there are none."""
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    if weight_ptr is None:
        weight = tl.full([1, 1], 1.0, like_ptr.dtype.element_ty)
    else:
        weight = upcast(
            tl.load(weight_ptr + column, mask=in_columns, other=0.0, eviction_policy="evict_last")
        )
    if bias_ptr is None:
        bias = tl.full([1, 1], 0.0, like_ptr.dtype.element_ty)
    else:
        bias = upcast(tl.load(bias_ptr + column, mask=in_columns, other=0.0, eviction_policy="evict_last"))
    return weight, bias


@triton.jit
def _store(ptr, first, element, inside, value):
    tl.store(ptr + first + element, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dropout(
    v, draw, first, shape, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr
):
    """D(v) / scale for the tile that begins at element ``first``, and the scale.

    Selected before it is scaled: behind the product LLVM selects in 16 bits, which is twice the work.
    """
    seed_ptr, seed, offset, threshold, scale = draw
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    _, columns = shape
    vector = first // VECTOR + tl.arange(0, BLOCK_COLUMNS // VECTOR)[None, :]
    vector += tl.arange(0, BLOCK_ROWS)[:, None] * (columns // VECTOR)
    drawn = tl.reshape(lanes(vector, seed, offset, VECTOR), [BLOCK_ROWS, BLOCK_COLUMNS])
    return tl.where(drawn >= (threshold.to(tl.uint32) << 16), v, 0.0), tl.full([1, 1], scale, v.dtype)


@triton.jit
def _hidden(
    tensors, draw, first, element, inside, shape,
    DROP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """h = skip + D(x), written where it is not x itself, and as rounded as it was written."""
    x_ptr, skip_ptr, h_ptr = tensors
    h = _load(x_ptr, first, element, inside)
    if DROP:
        h, scale = _dropout(h, draw, first, shape, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR)
        # Where nothing is added next, the mean is: a sum over lanes, which must not take in the product.
        h = rounded_product(h, scale) if skip_ptr is None else mul(h, scale)
    if skip_ptr is not None:
        h = total(_stored(skip_ptr, first, element, inside), h)
    if h_ptr is not None:
        stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + first + element, stored, mask=inside)
        h = upcast(stored)
    return h


@triton.jit
def _write_output(xhat, parameters, residual_ptr, y_ptr, first, element, inside, ACTIVATION: tl.constexpr):
    """y = f(xhat w + b + residual)."""
    weight, bias = parameters
    v = fma(xhat, weight, bias)
    if residual_ptr is not None:
        v = total(_stored(residual_ptr, first, element, inside), v)
    _store(y_ptr, first, element, inside, activation.forward(v, ACTIVATION, y_ptr.dtype.element_ty))


@triton.jit
def _write_statistics(ptr, first_row, rows, in_rows, mean, rstd, BLOCK_ROWS: tl.constexpr):
    row = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    tl.store(ptr + row, mean, mask=in_rows)
    tl.store(ptr + rows + row, rstd, mask=in_rows)


@triton.jit
def _read_statistics(ptr, first_row, rows, in_rows, BLOCK_ROWS: tl.constexpr):
    """Mean and rstd of some rows [BLOCK_ROWS, 1]; 0 outside, where xhat has to be finite."""
    row = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    return tl.load(ptr + row, mask=in_rows, other=0.0), tl.load(ptr + rows + row, mask=in_rows, other=0.0)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward(
    x_ptr,  # fp64, fp32, fp16 or bf16 [rows, columns], contiguous like all of that shape
    skip_ptr,  # any of those [rows, columns], or None
    h_ptr,  # [rows, columns], or None where h is x
    weight_ptr,  # [columns], or None
    bias_ptr,  # [columns], or None
    residual_ptr,  # [rows, columns], or None
    y_ptr,  # [rows, columns]
    statistics_ptr,  # fp32 (fp64 for fp64 tensors) [2, rows]: mean and rstd
    seed_ptr,  # int64 [1], or None where the seed comes as a number
    seed: tl.int64,
    offset: tl.int64,
    threshold: tl.int32,  # round(p 2^16)
    scale: tl.float64,
    eps: tl.float64,
    rows,
    vectors,  # a row
    DROP: tl.constexpr,  # D is no identity
    ACTIVATION: tl.constexpr,
    EVEN_ROWS: tl.constexpr,  # no tile has rows outside the tensor
    EVEN_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,  # a whole row
    VECTOR: tl.constexpr,  # elements of a 16-byte access, or what divides a row
    WIDE: tl.constexpr,  # 64-bit indices, for 2^31 elements and more
):
    """Some whole rows a program; grid: (row blocks,)."""
    shape = (rows, _index(vectors, WIDE) * VECTOR)
    first_row = _index(tl.program_id(0), WIDE) * BLOCK_ROWS
    first, element, in_rows, in_columns = _tile(
        first_row, 0, shape, EVEN_ROWS, EVEN_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS
    )
    inside = in_rows & in_columns
    draw = (seed_ptr, seed, offset, threshold, scale)
    h = _hidden(
        (x_ptr, skip_ptr, h_ptr), draw, first, element, inside, shape, DROP, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR
    )
    share = 1.0 / shape[1].to(h.dtype)
    mean = rounded_product(
        tl.sum(h, 1, keep_dims=True), share
    )  # rounded, as it is stored: a constant row is zero
    centred = add(h, -mean)
    if not EVEN_COLUMNS:
        centred = tl.where(in_columns, centred, 0.0)
    variance = tl.sum(terms(centred, centred, 1, VECTOR), 1, keep_dims=True) * share
    rstd = tl.rsqrt(variance + tl.full([1, 1], eps, h.dtype))
    _write_statistics(statistics_ptr, first_row, rows, in_rows, mean, rstd, BLOCK_ROWS)
    parameters = _parameters(weight_ptr, bias_ptr, 0, in_columns, statistics_ptr, BLOCK_COLUMNS)
    _write_output(mul(centred, rstd), parameters, residual_ptr, y_ptr, first, element, inside, ACTIVATION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_long(
    x_ptr, skip_ptr, h_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, statistics_ptr,
    seed_ptr, seed: tl.int64, offset: tl.int64, threshold: tl.int32, scale: tl.float64, eps: tl.float64,
    rows, vectors, DROP: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``forward`` for rows that do not fit in registers, one a program, in chunks of BLOCK_COLUMNS.

    Every lane of a chunk keeps mean and squares of its own columns (Welford 1962); they are merged once, at the
    end (Chan, Golub and LeVeque 1983).
    """
    shape = (rows, _index(vectors, WIDE) * VECTOR)
    columns = shape[1]
    row = _index(tl.program_id(0), WIDE)
    draw = (seed_ptr, seed, offset, threshold, scale)
    lane_mean = tl.zeros([1, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    lane_squares = tl.zeros([1, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    count = tl.zeros([1, 1], lane_mean.dtype)
    first_column = tl.full([], 0, tl.int64 if WIDE else tl.int32)
    while first_column < columns:
        first, element, _, in_columns = _tile(row, first_column, shape, True, EVEN_COLUMNS, 1, BLOCK_COLUMNS)
        h = _hidden(
            (x_ptr, skip_ptr, h_ptr), draw, first, element, in_columns, shape, DROP, 1, BLOCK_COLUMNS, VECTOR
        )
        count += 1.0
        distance = h - lane_mean
        if not EVEN_COLUMNS:
            distance = tl.where(in_columns, distance, 0.0)
        lane_mean += distance * (1.0 / count)
        lane_squares += distance * (h - lane_mean)
        first_column += BLOCK_COLUMNS

    share = 1.0 / columns.to(lane_mean.dtype)
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    lane_count = ((columns - lane + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS).to(lane_mean.dtype)
    mean = rounded_product(tl.sum(terms(lane_mean, lane_count, 1, VECTOR), 1, keep_dims=True), share)
    distance = lane_mean - mean
    variance = tl.sum(lane_squares + distance * distance * lane_count, 1, keep_dims=True) * share
    rstd = tl.rsqrt(variance + tl.full([1, 1], eps, variance.dtype))
    _write_statistics(statistics_ptr, row, rows, tl.full([1, 1], True, tl.int1), mean, rstd, 1)

    tl.debug_barrier()  # another thread may read a part of h than the one that wrote it
    first_column = tl.full([], 0, tl.int64 if WIDE else tl.int32)
    while first_column < columns:
        first, element, _, in_columns = _tile(row, first_column, shape, True, EVEN_COLUMNS, 1, BLOCK_COLUMNS)
        stored_ptr = x_ptr if h_ptr is None else h_ptr
        xhat = _normalized(stored_ptr, first, element, in_columns, mean, rstd)
        parameters = _parameters(
            weight_ptr, bias_ptr, first_column, in_columns, statistics_ptr, BLOCK_COLUMNS
        )
        _write_output(xhat, parameters, residual_ptr, y_ptr, first, element, in_columns, ACTIVATION)
        first_column += BLOCK_COLUMNS


@triton.jit
def _gradient(xhat, parameters, tensors, first, element, inside, ACTIVATION: tl.constexpr):
    """g = f'(xhat w + b + residual) dy."""
    dy_ptr, residual_ptr = tensors
    weight, bias = parameters
    g = _load(dy_ptr, first, element, inside).to(xhat.dtype)
    if ACTIVATION is not None:
        v = fma(xhat, weight, bias)
        if residual_ptr is not None:
            v = total(_stored(residual_ptr, first, element, inside), v)
        g = activation.backward(g, v, ACTIVATION, dy_ptr.dtype.element_ty)
    return g


@triton.jit
def _centred_gradient(wg, xhat, mean_wg, mean_wg_xhat, rstd):
    """dh = rstd (w g - mean(w g) - xhat mean(w g xhat))."""
    # One instruction more than with rstd multiplied out, and a register less.
    return mul(add(wg, fma(xhat, -mean_wg_xhat, -mean_wg)), rstd)


@triton.jit
def _write_gradients(
    dh, g, tensors, draw, first, element, inside, shape,
    DROP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """What follows from the gradients behind (g) and before (dh) the normalization."""
    dh_ptr, dx_ptr, dskip_ptr, dresidual_ptr = tensors
    if dresidual_ptr is not None:
        _store(dresidual_ptr, first, element, inside, g)
    if dh_ptr is not None:
        dh = total(_stored(dh_ptr, first, element, inside), dh)
    if dskip_ptr is not None:
        _store(dskip_ptr, first, element, inside, dh)
    if dx_ptr is not None:
        if DROP:
            dh, scale = _dropout(dh, draw, first, shape, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR)
            dh = mul(dh, scale)
        _store(dx_ptr, first, element, inside, dh)


@triton.jit
def _backward_rows(
    block, sums, tensors, parameters, draw, shape, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of one block of rows. Returns the sums over the rows with what the block adds to them."""
    dy_ptr, dh_ptr, h_ptr, residual_ptr, statistics_ptr, dx_ptr, dskip_ptr, dresidual_ptr = tensors
    dweight, dbias = sums
    weight, _ = parameters
    rows, columns = shape
    first_row = _index(block, WIDE) * BLOCK_ROWS
    first, element, in_rows, in_columns = _tile(
        first_row, 0, shape, EVEN_ROWS, EVEN_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS
    )
    inside = in_rows & in_columns
    mean, rstd = _read_statistics(statistics_ptr, first_row, rows, in_rows, BLOCK_ROWS)
    xhat = _normalized(h_ptr, first, element, inside, mean, rstd)
    g = _gradient(xhat, parameters, (dy_ptr, residual_ptr), first, element, inside, ACTIVATION)
    # Columns outside count nothing: g is 0 there.
    wg = terms(g, weight, 1, used=True)
    share = 1.0 / columns.to(wg.dtype)
    mean_wg = tl.sum(wg, 1, keep_dims=True) * share
    mean_wg_xhat = tl.sum(terms(wg, xhat, 1), 1, keep_dims=True) * share
    dh = _centred_gradient(wg, xhat, mean_wg, mean_wg_xhat, rstd)
    _write_gradients(
        dh, g, (dh_ptr, dx_ptr, dskip_ptr, dresidual_ptr), draw, first, element, inside, shape,
        DROP, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR,
    )  # fmt: skip
    return fma(g, xhat, dweight), add(dbias, g)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward(
    dy_ptr,  # fp64, fp32, fp16 or bf16 [rows, columns], contiguous like all of that shape
    dh_ptr,  # the gradient of h as a result of its own, or None
    h_ptr,  # forward's h, or its x where that is h
    weight_ptr,
    bias_ptr,  # None also where f is the identity, like the residual: nothing depends on them then
    residual_ptr,
    statistics_ptr,
    dx_ptr,  # [rows, columns], None where not wanted, like the next four
    dskip_ptr,
    dresidual_ptr,
    dweight_ptr,  # fp32 (fp64 for fp64 tensors) [programs, columns]: the sum over the rows of a program
    dbias_ptr,
    seed_ptr, seed: tl.int64, offset: tl.int64, threshold: tl.int32, scale: tl.float64, rows, vectors,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients. A program walks down the rows, one block in every ``programs``; grid: (programs,)."""
    shape = (rows, _index(vectors, WIDE) * VECTOR)
    draw = (seed_ptr, seed, offset, threshold, scale)
    tensors = (dy_ptr, dh_ptr, h_ptr, residual_ptr, statistics_ptr, dx_ptr, dskip_ptr, dresidual_ptr)
    _, _, _, in_columns = _tile(0, 0, shape, True, EVEN_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    parameters = _parameters(weight_ptr, bias_ptr, 0, in_columns, statistics_ptr, BLOCK_COLUMNS)
    # A thread adds up each of its positions in the tile; the rows of the tile are added once, at the end.
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    if INTERPRETED:
        # The same loop for the interpreter of Triton 3.6, which cannot count one with numpy 2.4.
        block = tl.program_id(0)
        while block < blocks:
            dweight, dbias = _backward_rows(
                block, (dweight, dbias), tensors, parameters, draw, shape, EVEN_ROWS, EVEN_COLUMNS,
                DROP, ACTIVATION, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR, WIDE,
            )  # fmt: skip
            block += tl.num_programs(0)
    else:
        # Two stages: the next rows are on their way to shared memory while these are computed.
        for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=2):
            dweight, dbias = _backward_rows(
                block, (dweight, dbias), tensors, parameters, draw, shape, EVEN_ROWS, EVEN_COLUMNS,
                DROP, ACTIVATION, BLOCK_ROWS, BLOCK_COLUMNS, VECTOR, WIDE,
            )  # fmt: skip
    column = tl.arange(0, BLOCK_COLUMNS)
    partial = tl.program_id(0).to(tl.int64) * shape[1] + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < shape[1])
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < shape[1])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_long(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, bias_ptr, residual_ptr, statistics_ptr, dx_ptr, dskip_ptr, dresidual_ptr,
    seed_ptr, seed: tl.int64, offset: tl.int64, threshold: tl.int32, scale: tl.float64, rows, vectors,
    DROP: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``backward`` for rows that do not fit in registers, one a program, without the sums over rows."""
    shape = (rows, _index(vectors, WIDE) * VECTOR)
    row = _index(tl.program_id(0), WIDE)
    draw = (seed_ptr, seed, offset, threshold, scale)
    mean, rstd = _read_statistics(statistics_ptr, row, rows, tl.full([1, 1], True, tl.int1), 1)
    sum_wg = tl.zeros([1, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    sum_wg_xhat = tl.zeros([1, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    first_column = tl.full([], 0, tl.int64 if WIDE else tl.int32)
    while first_column < shape[1]:
        first, element, _, in_columns = _tile(row, first_column, shape, True, EVEN_COLUMNS, 1, BLOCK_COLUMNS)
        xhat = _normalized(h_ptr, first, element, in_columns, mean, rstd)
        parameters = _parameters(
            weight_ptr, bias_ptr, first_column, in_columns, statistics_ptr, BLOCK_COLUMNS
        )
        g = _gradient(xhat, parameters, (dy_ptr, residual_ptr), first, element, in_columns, ACTIVATION)
        wg = mul(g, parameters[0])
        sum_wg = add(sum_wg, wg)
        sum_wg_xhat = fma(wg, xhat, sum_wg_xhat)
        first_column += BLOCK_COLUMNS

    share = 1.0 / shape[1].to(sum_wg.dtype)
    mean_wg = tl.sum(sum_wg, 1, keep_dims=True) * share
    mean_wg_xhat = tl.sum(sum_wg_xhat, 1, keep_dims=True) * share
    first_column = tl.full([], 0, tl.int64 if WIDE else tl.int32)
    while first_column < shape[1]:
        first, element, _, in_columns = _tile(row, first_column, shape, True, EVEN_COLUMNS, 1, BLOCK_COLUMNS)
        xhat = _normalized(h_ptr, first, element, in_columns, mean, rstd)
        parameters = _parameters(
            weight_ptr, bias_ptr, first_column, in_columns, statistics_ptr, BLOCK_COLUMNS
        )
        g = _gradient(xhat, parameters, (dy_ptr, residual_ptr), first, element, in_columns, ACTIVATION)
        wg = mul(g, parameters[0])
        dh = _centred_gradient(wg, xhat, mean_wg, mean_wg_xhat, rstd)
        tensors = (dh_ptr, dx_ptr, dskip_ptr, dresidual_ptr)
        _write_gradients(
            dh, g, tensors, draw, first, element, in_columns, shape, DROP, 1, BLOCK_COLUMNS, VECTOR
        )
        first_column += BLOCK_COLUMNS


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_columns(
    dy_ptr, h_ptr, weight_ptr, bias_ptr, residual_ptr, statistics_ptr, dweight_ptr, dbias_ptr, rows, vectors,
    ACTIVATION: tl.constexpr, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of ``backward`` alone, a block of columns a program; grid: (column blocks, row programs)."""
    shape = (rows, _index(vectors, WIDE) * VECTOR)
    first_column = _index(tl.program_id(0), WIDE) * BLOCK_COLUMNS
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], statistics_ptr.dtype.element_ty)
    _, _, _, in_columns = _tile(0, first_column, shape, True, EVEN_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    parameters = _parameters(weight_ptr, bias_ptr, first_column, in_columns, statistics_ptr, BLOCK_COLUMNS)
    first_row = _index(tl.program_id(1), WIDE) * BLOCK_ROWS
    while first_row < rows:
        first, element, in_rows, in_columns = _tile(
            first_row, first_column, shape, EVEN_ROWS, EVEN_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS
        )
        inside = in_rows & in_columns
        mean, rstd = _read_statistics(statistics_ptr, first_row, rows, in_rows, BLOCK_ROWS)
        xhat = _normalized(h_ptr, first, element, inside, mean, rstd)
        g = _gradient(xhat, parameters, (dy_ptr, residual_ptr), first, element, inside, ACTIVATION)
        dweight = fma(g, xhat, dweight)
        dbias = add(dbias, g)
        first_row += _index(tl.num_programs(1), WIDE) * BLOCK_ROWS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    partial = tl.program_id(1).to(tl.int64) * shape[1] + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < shape[1])
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < shape[1])
