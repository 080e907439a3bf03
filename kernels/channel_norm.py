"""Batch, group and instance normalization: y = f((x - mean) / sqrt(var + eps) weight + bias + residual).

Ioffe and Szegedy 2015 (batch), Ulyanov et al. 2016 (instance), Wu and He 2018 (group). One set of kernels: a LINE
is what one channel has in one set of statistics, and ``width`` neighbouring lines make a UNITS, which shares them.

                    lines                    a line                       width
    batch norm      channels                 N x spatial positions        1
    instance norm   samples x channels       spatial positions            1
    group norm      samples x channels       spatial positions            channels of a group

Memory has two orders. Channels first, a line is ``segments`` runs of ``along`` neighbouring elements; channels last
(LAST), it is a column. Tiles are [LINES, ALONG] in the first and [ALONG, LINES] in the second, and that is all the
difference: a value per line is spread over a tile by ``_spread``, and a tile summed to one by ``_line_sum``.

Two plans, with accesses of an activation-sized tensor in device memory (forward / backward):

    whole   one program takes whole units                                                2 / 3
    split   every line is spread over ``splits`` programs, so that 3 channels fill
            a GPU as well as 3,000; sums, a small merge, and a second pass           3 / 5

``whole`` keeps its unit in registers, where it fits: all tiles are loaded, TILES of them a line and written out one by
one, and stay as they are stored (two 16-bit elements a register), so that the mean comes first, then deviations from
it, then the result. The backward pass keeps g, in the dtype of dy as eager PyTorch has it behind an activation, and
computes the activation once; and x, or, where that is too much (REREAD), reads x again from the L2 cache: a part at a
time, and the first time while the part before is summed, so that loads are on their way behind all barriers. Only the
last tile of a line needs masks. Units too large for registers are read twice, in loops, the second time from the cache.

The lines of a unit are one tile; channels first, several PARTS if no power of 2 is near (10 channels are 5 times 2).

Instructions are predicted to take less time than memory on an A100, an H100 and a B200 in all forms that are inspected,
but for bf16 planes that no vector divides on a B200, which reads a bf16 element in the time of 10 instructions
(bench/batch_norm.py has figures). Registers are the narrow place: what the two passes share, the compiler would keep in
them (``renamed``), and what they hold in 16 bits, in 32 (``packed``).

A residual is one more read forward and one more write backward (its gradient). Its activation needs the sign or the
value of what it was applied to: relu and leaky_relu keep ONE BIT an element (``signs``), others read the residual
again. Without a residual the backward pass computes that value from x. Nothing else is saved but a mean and a
variance a unit.

Statistics: in registers in two passes, exact; else sums of x - shift and its square, where the shift is the mean of
the program's first tile, so nothing cancels whatever the mean (E[x^2] - E[x]^2 is off by 12 % at a mean of 1,000);
programs are merged with the formula of Chan, Golub and LeVeque. No atomics: the same input gives the same bits.
"""

import triton
import triton.language as tl

from . import activation
from .fastmath import add, difference, fma, in_lanes, mul, packed, renamed, upcast

# --- where a program works --------------------------------------------------------------------------------


@triton.jit
def _spread(v, LAST: tl.constexpr):
    """A value a line [LINES], to be broadcast over a tile."""
    return v[None, :] if LAST else v[:, None]


@triton.jit
def _line_sum(tile, LAST: tl.constexpr):
    return tl.sum(tile, axis=0 if LAST else 1)


@triton.jit
def _extents(outer, inner_vectors, block, VECTOR: tl.constexpr, LAST: tl.constexpr):
    """Lines, elements of a line in a segment, and the lines of a program.

    Written as products, so that the compiler sees that a vector is inside as a whole or not at all, and aligned.
    """
    inner = inner_vectors * VECTOR
    if LAST:
        return inner, outer, block * VECTOR
    else:
        return outer, inner, block


@triton.jit
def _place(shape, block, splits):
    """What this program works on: (batch, first line, number of lines), and which split of them."""
    lines, _, _ = shape
    blocks = tl.cdiv(lines, block)
    rest = tl.program_id(0) // blocks
    first_line = (tl.program_id(0) - rest * blocks) * block
    batch = rest // splits
    return (batch, first_line, block), rest - batch * splits


@triton.jit
def _whole_place(block):
    """The same of a program with whole units, from a grid of blocks and batches: without divisions."""
    return tl.program_id(1), tl.program_id(0) * block, block


@triton.jit
def _unit_of_program():
    """The unit of a program that has one."""
    return tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _part(place, part, PARTS: tl.constexpr, LINES: tl.constexpr):
    """The place of one of the PARTS with LINES lines that make a unit."""
    if PARTS == 1:
        return place
    else:
        batch, first_line, _ = place
        return batch, first_line + part * LINES, LINES


@triton.jit
def _one():
    """The split of a program with whole units. As a constant, LLVM would know the trips of the loops over tiles and
    write them as unrolled copies and a remainder."""
    return tl.num_programs(2)


@triton.jit
def _lines(place, lines, LINES: tl.constexpr):
    """The lines of this program [LINES], and which of them are there."""
    _, first_line, block = place
    line = tl.arange(0, LINES)
    return first_line + line, (line < block) & (first_line + line < lines)


@triton.jit
def _tile(
    tile, place, shape, EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr
):
    """Of a tile: index of its first element, offsets from there, which are inside, and how many along."""
    lines, along, segments = shape
    batch, first_line, block = place
    if segments is None:
        start = tile * ALONG
        segment = batch
    else:
        blocks = tl.cdiv(along, ALONG)
        segment = tile // blocks
        start = (tile - segment * blocks) * ALONG
    line = _spread(tl.arange(0, LINES), LAST)
    step = _spread(tl.arange(0, ALONG), not LAST)
    if LAST:
        first = (segment.to(tl.int64) * along + start) * lines + first_line
        offset = step * lines + line
    else:
        first = (segment.to(tl.int64) * lines + first_line) * along + start
        offset = line * along + step
    if EVEN:
        inside = tl.full([1, 1], True, tl.int1)
    else:
        # One comparison a tile: where a line ends, which is at once if it is not there, is the same in all tiles.
        there = (line < block) & (first_line + line < lines)
        inside = start + step < there.to(tl.int32) * along
    return first, offset, inside, tl.minimum(along - start, ALONG)


@triton.jit
def _tiles(shape, ALONG: tl.constexpr):
    _, along, segments = shape
    if segments is None:
        return tl.cdiv(along, ALONG)
    else:
        return segments * tl.cdiv(along, ALONG)


@triton.jit
def _gathered(tile, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Channels first, the sums of whole vectors, which are a thread's own: one register of it in place of several."""
    if LAST or VECTOR == 1:
        return tile
    else:
        return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // VECTOR, VECTOR]), axis=2)


@triton.jit
def _with(sums, tile, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Sums of tiles (``_gathered``) with those of one more."""
    return add(sums, tile) if LAST or VECTOR == 1 else sums + _gathered(tile, LAST, VECTOR)


@triton.jit
def _with_product(sums, a, b, LAST: tl.constexpr, VECTOR: tl.constexpr):
    return fma(a, b, sums) if LAST or VECTOR == 1 else sums + _gathered(a * b, LAST, VECTOR)


# --- values per line --------------------------------------------------------------------------------------


@triton.jit
def _value(ptr, index, there, default, like):
    """``ptr[index]`` in the dtype of ``like``, or the default where there is no pointer."""
    if ptr is None:
        return tl.full(index.shape, default, like.dtype)
    else:
        return upcast(tl.load(ptr + index, mask=there, other=default)).to(like.dtype)


@triton.jit
def _indices(
    place, shape, channels, repeat, width, UNITS: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr
):
    """Unit and channel of each line, and whether it is there."""
    lines, _, _ = shape
    batch, first_line, _ = place
    line, there = _lines(place, lines, LINES)
    if UNITS == 1:
        unit = tl.full([LINES], _unit_of_program(), tl.int32)
    elif UNITS > 1:
        unit = (batch * lines + first_line) // width + tl.arange(0, LINES) // width  # of whole units
    else:
        unit = (batch * lines + line) // width
    if LAST:
        channel = line if repeat == 1 else unit
    elif UNITS == 1:
        channel = first_line % channels + tl.arange(0, LINES)
    else:
        channel = line % channels
    return unit, channel, there


@triton.jit
def _rstd(var, eps):
    return tl.rsqrt(var + tl.full(var.shape, eps, var.dtype))


@triton.jit
def _statistics_of(mean_ptr, var_ptr, eps, unit, there, UNITS: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of each line."""
    if UNITS == 1:
        # Loaded once, they are one value to the compiler, and one register.
        own = tl.full([1], _unit_of_program(), tl.int32)
        mean, rstd = in_lanes(tl.load(mean_ptr + own)), _rstd(tl.load(var_ptr + own), eps)
        return tl.broadcast_to(mean, unit.shape), tl.broadcast_to(rstd, unit.shape)
    else:
        mean = tl.load(mean_ptr + unit, mask=there, other=0.0)
        return mean, _rstd(tl.load(var_ptr + unit, mask=there, other=1.0), eps)


@triton.jit
def _affine(mean, rstd, weight_ptr, bias_ptr, channel, there):
    """(mean, scale, bias) of each line, with which v = (x - mean) scale + bias."""
    scale = rstd * _value(weight_ptr, channel, there, 1.0, mean)
    return mean, scale, _value(bias_ptr, channel, there, 0.0, mean)


@triton.jit
def _unit_sum(v, width, UNITS: tl.constexpr, LINES: tl.constexpr):
    """At each line, the sum of ``v`` over the lines of its unit. ``v`` is 0 at lines that are not there."""
    if UNITS == 0:
        return v
    elif UNITS == 1:
        return tl.full([LINES], tl.sum(v, axis=0), v.dtype)
    else:
        # Units of any width: their lines are gathered to a row each, and the sums to the lines. LINES and UNITS are
        # powers of 2, and the width less than twice their ratio.
        WIDTH: tl.constexpr = 2 * LINES // UNITS
        place = tl.arange(0, UNITS)[:, None] * width + tl.arange(0, WIDTH)[None, :]
        inside = (tl.arange(0, WIDTH)[None, :] < width) & (place < LINES)
        row = tl.gather(v, tl.reshape(tl.where(inside, place, 0), [UNITS * WIDTH]), 0)
        sums = tl.sum(tl.where(inside, tl.reshape(row, [UNITS, WIDTH]), 0.0), axis=1)
        return tl.gather(sums, tl.minimum(tl.arange(0, LINES) // width, UNITS - 1), 0)


@triton.jit
def _tile_unit_sum(tile, width, UNITS: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr):
    """At each line, the sum of a tile over its unit. Lines that are not there are 0."""
    if UNITS == 1:
        return tl.full([LINES], tl.sum(tile), tile.dtype)
    else:
        return _unit_sum(_line_sum(tile, LAST), width, UNITS, LINES)


@triton.jit
def _unit_moments(mean, var, there, width, UNITS: tl.constexpr, LINES: tl.constexpr):
    """Moments of lines of equal length merged to those of their unit."""
    if UNITS == 0:
        return mean, var
    else:
        share = 1.0 / width.to(mean.dtype)
        unit_mean = _unit_sum(tl.where(there, mean, 0.0), width, UNITS, LINES) * share
        d = mean - unit_mean
        return unit_mean, _unit_sum(tl.where(there, var + d * d, 0.0), width, UNITS, LINES) * share


@triton.jit
def _merged_parts(means, variances, PARTS: tl.constexpr):
    """Moments of each line of a part merged with those of the lines at the same place in the others."""
    if PARTS == 1:
        return means[0], variances[0]
    else:
        mean = tl.zeros_like(means[0])
        for part in tl.static_range(PARTS):
            mean += means[part]
        mean /= PARTS
        var = tl.zeros_like(mean)
        for part in tl.static_range(PARTS):
            d = means[part] - mean
            var += variances[part] + d * d
        return mean, var / PARTS


@triton.jit
def _update_running(running, momentum, index, there, mean, var, count):
    """running = (1 - momentum) running + momentum new, with the unbiased variance.

    there: for one line of each unit, as what several lines read and wrote in turn would be updated twice.
    count: elements of a unit.
    """
    running_mean_ptr, running_var_ptr = running
    momentum_ptr, momentum = momentum
    count += tl.zeros_like(mean)
    there &= count > 1  # fewer values have no variance: processes that all got an empty batch
    if momentum_ptr is not None:
        momentum = upcast(tl.load(momentum_ptr)).to(mean.dtype)
    new = tl.full(mean.shape, momentum, mean.dtype)
    if running_mean_ptr is not None:
        old = upcast(tl.load(running_mean_ptr + index, mask=there)).to(mean.dtype)
        value = (1.0 - new) * old + new * mean
        tl.store(running_mean_ptr + index, value.to(running_mean_ptr.dtype.element_ty), mask=there)
    if running_var_ptr is not None:
        old = upcast(tl.load(running_var_ptr + index, mask=there)).to(mean.dtype)
        value = (1.0 - new) * old + new * (var * (count / (count - 1.0)))
        tl.store(running_var_ptr + index, value.to(running_var_ptr.dtype.element_ty), mask=there)


# --- signs: one bit an element ----------------------------------------------------------------------------


@triton.jit
def _sign_bytes(
    tile, place, shape, EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr
):
    """``_tile`` of the bytes, each of which holds the bits of eight neighbouring elements."""
    lines, along, segments = shape
    batch, first_line, block = place
    if LAST:
        bytes_shape = (lines // 8, along, segments)
        bytes_place = (batch, first_line // 8, block // 8)
        first, offset, inside, _ = _tile(tile, bytes_place, bytes_shape, EVEN, LAST, LINES // 8, ALONG)
    else:
        first, offset, inside, _ = _tile(
            tile, place, (lines, along // 8, segments), EVEN, LAST, LINES, ALONG // 8
        )
    return first, offset, inside


@triton.jit
def _store_signs(signs_ptr, v, tile, place, shape, EVEN: tl.constexpr, LAST: tl.constexpr):
    LINES: tl.constexpr = v.shape[1] if LAST else v.shape[0]
    ALONG: tl.constexpr = v.shape[0] if LAST else v.shape[1]
    first, offset, inside = _sign_bytes(tile, place, shape, EVEN, LAST, LINES, ALONG)
    bits = tl.reshape(tl.where(v <= 0, 0, 1), [v.shape[0], v.shape[1] // 8, 8])
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
    tl.store(signs_ptr + first + offset, packed.to(tl.uint8), mask=inside)


@triton.jit
def _load_signs(
    signs_ptr, tile, place, shape, like,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """1 where the bit is set and -1 elsewhere, shaped as ``like``: a stand-in for the value whose sign it is."""
    first, offset, inside = _sign_bytes(tile, place, shape, EVEN, LAST, LINES, ALONG)
    packed = tl.load(signs_ptr + first + offset, mask=inside, other=0).to(tl.int32)
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, like.shape) != 0, 1.0, -1.0).to(like.dtype)


# --- forward ----------------------------------------------------------------------------------------------


@triton.jit
def _deviation(x_ptr, shift, tile, place, shape, EVEN, LAST, LINES, ALONG):
    first, offset, inside, count = _tile(tile, place, shape, EVEN, LAST, LINES, ALONG)
    if shift is None:
        x = upcast(tl.load(x_ptr + first + offset, mask=inside, other=0.0))
        # As x is stored: what is not there can then be loaded as the shift, which deviates from itself by 0.
        shift = upcast((_line_sum(x, LAST) / count.to(x.dtype)).to(x_ptr.dtype.element_ty))
        d = x - _spread(shift, LAST)
        d = d if EVEN else tl.where(inside, d, 0.0)
    else:
        other = _spread(shift, LAST).to(x_ptr.dtype.element_ty)
        d = difference(tl.load(x_ptr + first + offset, mask=inside, other=other), _spread(shift, LAST))
    return d, shift, count


@triton.jit
def _line_moments(
    x_ptr, place, split, splits, shape,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Mean and (biased) variance of each line [LINES] over this program's tiles, and how many elements that is."""
    d, shift, count = _deviation(x_ptr, None, split, place, shape, EVEN, LAST, LINES, ALONG)
    sums = d
    squares = d * d
    tile = split + splits
    while tile < _tiles(shape, ALONG):
        d, _, n = _deviation(x_ptr, shift, tile, place, shape, EVEN, LAST, LINES, ALONG)
        sums = add(sums, d)
        squares = fma(d, d, squares)
        count += n
        tile += splits
    count = count.to(sums.dtype)
    off = _line_sum(sums, LAST) / count
    var = _line_sum(squares, LAST) / count - off * off
    return shift + off, tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL), count


@triton.jit
def _keep(
    ptr, place, shape, TILES: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """All tiles of a part, as they are stored: 16-bit ones take half a register an element."""
    kept = ()
    for tile in tl.static_range(TILES):
        first, offset, inside, _ = _tile(tile, place, shape, EVEN or tile < FULL, LAST, LINES, ALONG)
        kept = kept + (tl.load(ptr + first + offset, mask=inside, other=0.0),)  # noqa: RUF005
    return kept


@triton.jit
def _kept_moments(
    kept, place, shape, width, UNITS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """At each line, mean and (biased) variance of its unit, one after the other; and the elements of a line."""
    _, along, segments = shape
    sums = _gathered(upcast(kept[0][0]), LAST, VECTOR)
    for part in tl.static_range(PARTS):
        for tile in tl.static_range(0 if part else 1, TILES):
            sums = _with(sums, upcast(kept[part][tile]), LAST, VECTOR)
    count = tl.full([1], along if segments is None else along * segments, tl.int32).to(sums.dtype)
    elements = count * width
    mean = _tile_unit_sum(sums, width, UNITS, LAST, LINES) / elements
    squares = tl.zeros_like(sums)
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        for tile in tl.static_range(TILES):
            d = difference(kept[part][tile], _spread(mean, LAST))
            if not (EVEN or tile < FULL):
                _, _, inside, _ = _tile(tile, own, shape, EVEN, LAST, LINES, ALONG)
                d = tl.where(inside, d, 0.0)
            squares = _with_product(squares, d, d, LAST, VECTOR)
    return mean, _tile_unit_sum(squares, width, UNITS, LAST, LINES) / elements, count


@triton.jit
def _preactivation(d, values, residual_ptr, first, offset, inside, LAST: tl.constexpr):
    """(x - mean) scale + bias + residual, from d = x - mean."""
    _, scale, bias = values
    v = fma(d, _spread(scale, LAST), _spread(bias, LAST))
    if residual_ptr is not None:
        v = add(v, upcast(tl.load(residual_ptr + first + offset, mask=inside, other=0.0)).to(v.dtype))
    return v


@triton.jit
def _apply_tile(
    x, tensors, values, tile, place, shape, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """x: the tile, or None to load it."""
    x_ptr, residual_ptr, y_ptr, signs_ptr = tensors
    first, offset, inside, _ = _tile(tile, place, shape, EVEN, LAST, LINES, ALONG)
    if x is None:
        x = tl.load(x_ptr + first + offset, mask=inside, other=0.0)
    mean, _, _ = values
    d = difference(x, _spread(mean, LAST))
    v = _preactivation(d, values, residual_ptr, first, offset, inside, LAST)
    if signs_ptr is not None:
        _store_signs(signs_ptr, v, tile, place, shape, EVEN, LAST)
    y = activation.forward(v, ACTIVATION, x.dtype)
    tl.store(y_ptr + first + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _apply_tiles(
    tensors, values, place, split, splits, shape, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    # The last tiles first: they were read last, and are the likeliest to be in a cache.
    tile = _tiles(shape, ALONG) - 1 - split
    while tile >= 0:
        _apply_tile(None, tensors, values, tile, place, shape, ACTIVATION, EVEN, LAST, LINES, ALONG)
        tile -= splits


@triton.jit
def whole_forward(
    x_ptr,  # fp64, fp32, fp16 or bf16: dense, [segments, lines, along] or (LAST) [batches, along, lines]
    residual_ptr,  # any of those, laid out as x, or None
    y_ptr,  # any of those, laid out as x
    signs_ptr,  # uint8 [elements / 8] or None: bit i % 8 of byte i // 8 is "element i of v is not <= 0"
    mean_ptr,  # fp32 (fp64 for fp64 x) [units]: written
    var_ptr,  # as mean: biased
    weight_ptr,  # any dtype [channels], or None
    bias_ptr,
    running_mean_ptr,  # any dtype [units], or None: updated. Batch normalization only.
    running_var_ptr,
    momentum_ptr,  # any dtype [1], or None where it comes as a number
    momentum: tl.float64,
    eps: tl.float64,
    outer,  # lines, or (LAST) elements of a line
    inner_vectors,  # the innermost dimension of the view above, in vectors
    segments,  # None: one
    channels,
    repeat,  # neighbouring lines that are of one channel: 1, or (LAST) the width
    width,  # lines of a unit
    block,  # lines of a program: whole units. LAST: in vectors
    ACTIVATION: tl.constexpr,
    UNITS: tl.constexpr,  # of a program, rounded up to a power of 2; 0: every line is one
    TILES: tl.constexpr,  # of a line (of a part), all kept in registers; 0: tiles are read twice, in loops
    PARTS: tl.constexpr,  # into which the lines of a program are dealt; several: of its one unit
    FULL: tl.constexpr,  # so many tiles of a line in registers are full
    EVEN: tl.constexpr,  # all tiles are full
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    LINES: tl.constexpr,  # of a part
    ALONG: tl.constexpr,
):
    """Everything, a block of whole units a program. Grid: (blocks of lines, batches)."""
    lines, along, block = _extents(outer, inner_vectors, block, VECTOR, LAST)
    shape = (lines, along, segments)
    place = _whole_place(block)
    split = 0
    unit, _, there = _indices(
        _part(place, 0, PARTS, LINES), shape, channels, repeat, width, UNITS, LAST, LINES
    )
    if TILES:
        kept = ()
        for part in tl.static_range(PARTS):
            own = _part(place, part, PARTS, LINES)
            kept = kept + (_keep(x_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
        mean, var, count = _kept_moments(
            kept, place, shape, width, UNITS, TILES, PARTS, FULL,
            EVEN, LAST, VECTOR if UNITS == 1 else 1, LINES, ALONG,
        )  # fmt: skip
    else:
        means, variances = (), ()
        for part in tl.static_range(PARTS):
            own = _part(place, part, PARTS, LINES)
            mean, var, count = _line_moments(x_ptr, own, split, _one(), shape, EVEN, LAST, LINES, ALONG)
            means, variances = means + (mean,), variances + (var,)  # noqa: RUF005
        mean, var = _merged_parts(means, variances, PARTS)
        mean, var = _unit_moments(mean, var, there, width // PARTS, UNITS, LINES)
    leads = there & (tl.arange(0, LINES) - tl.arange(0, LINES) // width * width == 0)
    tl.store(mean_ptr + unit, mean, mask=leads)
    tl.store(var_ptr + unit, var, mask=leads)
    running = (running_mean_ptr, running_var_ptr)
    _update_running(running, (momentum_ptr, momentum), unit, leads, mean, var, count * width)
    rstd = _rstd(var, eps)
    tensors = (x_ptr, residual_ptr, y_ptr, signs_ptr)
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        _, channel, there = _indices(own, shape, channels, repeat, width, UNITS, LAST, LINES)
        values = _affine(mean, rstd, weight_ptr, bias_ptr, channel, there)
        if TILES:
            for tile in tl.static_range(TILES):
                _apply_tile(
                    kept[part][tile], tensors, values, tile, own, shape, ACTIVATION,
                    EVEN or tile < FULL, LAST, LINES, ALONG,
                )  # fmt: skip
        else:
            _apply_tiles(tensors, values, own, split, _one(), shape, ACTIVATION, EVEN, LAST, LINES, ALONG)


@triton.jit
def statistics(
    x_ptr,
    mean_ptr,  # fp32 (fp64) [splits, batches x lines]: moments of each line over a split's tiles
    var_ptr,
    count_ptr,  # fp32 (fp64) [splits]: elements of a line in the split
    outer,
    inner_vectors,
    segments,
    batches,
    block,
    splits,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    LINES: tl.constexpr,
    ALONG: tl.constexpr,
):
    """Reads x once. Grid: (batches x splits x blocks of lines,)."""
    lines, along, block = _extents(outer, inner_vectors, block, VECTOR, LAST)
    shape = (lines, along, segments)
    place, split = _place(shape, block, splits)
    batch, first_line, _ = place
    mean, var, count = _line_moments(x_ptr, place, split, splits, shape, EVEN, LAST, LINES, ALONG)
    line, there = _lines(place, shape[0], LINES)
    index = split * (batches * shape[0]) + batch * shape[0] + line
    tl.store(mean_ptr + index, mean, mask=there)
    tl.store(var_ptr + index, var, mask=there)
    if batch + first_line == 0:
        tl.store(count_ptr + split, count)


@triton.jit
def _merged_moments(partials, line, there, splits, stride, SPLITS: tl.constexpr, LINES: tl.constexpr):
    """Moments of each line over all splits (Chan, Golub, LeVeque), and their number of elements."""
    mean_ptr, var_ptr, count_ptr = partials
    shift = tl.load(mean_ptr + line, mask=there, other=0.0)  # split 0's: the means are close together
    total = tl.zeros([1], shift.dtype)
    off = tl.zeros_like(shift)
    squares = tl.zeros_like(shift)
    start = splits * 0
    while start < splits:
        split = start + tl.arange(0, SPLITS)
        count = tl.load(count_ptr + split, mask=split < splits, other=0.0)[:, None]
        index = split[:, None] * stride + line[None, :]
        inside = (split < splits)[:, None] & there[None, :]
        d = tl.load(mean_ptr + index, mask=inside, other=0.0) - shift[None, :]
        var = tl.load(var_ptr + index, mask=inside, other=0.0)
        d = tl.where(count > 0, d, 0.0)  # an empty split says nothing about the mean
        total += tl.sum(count, axis=0)
        off += tl.sum(count * d, axis=0)
        squares += tl.sum(count * (var + d * d), axis=0)
        start += SPLITS
    off /= total
    var = squares / total - off * off
    return shift + off, tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL), total


@triton.jit
def merge_statistics(
    partial_mean_ptr,  # what ``statistics`` wrote
    partial_var_ptr,
    partial_count_ptr,
    mean_ptr,  # [units]
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum_ptr,
    momentum: tl.float64,
    all_lines,  # batches x lines
    splits,
    width,
    block,
    UNITS: tl.constexpr,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """From partial moments to those of units. Grid: (blocks of whole units,)."""
    line, there = _lines((0, tl.program_id(0) * block, block), all_lines, LINES)
    partials = (partial_mean_ptr, partial_var_ptr, partial_count_ptr)
    mean, var, count = _merged_moments(partials, line, there, splits, all_lines, SPLITS, LINES)
    mean, var = _unit_moments(mean, var, there, width, UNITS, LINES)
    unit = line // width
    leads = there & (line % width == 0)
    tl.store(mean_ptr + unit, mean, mask=leads)
    tl.store(var_ptr + unit, var, mask=leads)
    running = (running_mean_ptr, running_var_ptr)
    _update_running(running, (momentum_ptr, momentum), unit, leads, mean, var, count * width)


@triton.jit
def apply(
    x_ptr,
    residual_ptr,
    y_ptr,
    signs_ptr,
    mean_ptr,  # [units], any dtype: read
    var_ptr,
    weight_ptr,
    bias_ptr,
    eps: tl.float64,
    outer,
    inner_vectors,
    segments,
    channels,
    repeat,
    width,
    block,
    splits,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    LINES: tl.constexpr,
    ALONG: tl.constexpr,
):
    """y from known statistics: the second pass in training, the only one in evaluation.

    Grid: (batches x splits x blocks of lines,).
    """
    lines, along, block = _extents(outer, inner_vectors, block, VECTOR, LAST)
    shape = (lines, along, segments)
    place, split = _place(shape, block, splits)
    unit, channel, there = _indices(place, shape, channels, repeat, width, 0, LAST, LINES)
    mean, rstd = _statistics_of(mean_ptr, var_ptr, eps, unit, there, 0)
    values = _affine(mean, rstd, weight_ptr, bias_ptr, channel, there)
    tensors = (x_ptr, residual_ptr, y_ptr, signs_ptr)
    _apply_tiles(tensors, values, place, split, splits, shape, ACTIVATION, EVEN, LAST, LINES, ALONG)


# --- backward ---------------------------------------------------------------------------------------------
#
# With g the gradient of v, xhat = (x - mean) rstd, and sums over a unit of m elements:
#     dbias = sum g        dweight = sum g xhat        (of each line, then over the samples)
#     dx = rstd (weight g - B - xhat W),   B = sum (weight g) / m,   W = sum (weight g xhat) / m


@triton.jit
def _gradient(
    x, dy, tensors, values, tile, place, shape, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Of a tile: g, x - mean, and where it lies. g is 0 outside the tensor. x, dy: the tiles, or None to load them."""
    dy_ptr, x_ptr, residual_ptr, signs_ptr = tensors
    mean, _, _ = values
    first, offset, inside, _ = _tile(tile, place, shape, EVEN, LAST, LINES, ALONG)
    if x is None:
        x = tl.load(x_ptr + first + offset, mask=inside, other=0.0)
    d = difference(x, _spread(mean, LAST))
    if dy is None:
        dy = tl.load(dy_ptr + first + offset, mask=inside, other=0.0)
    g = upcast(dy).to(d.dtype)
    if ACTIVATION is not None:
        if signs_ptr is not None:
            v = _load_signs(signs_ptr, tile, place, shape, d, EVEN, LAST, LINES, ALONG)
        else:
            v = _preactivation(d, values, residual_ptr, first, offset, inside, LAST)
        g = activation.backward(g, v, ACTIVATION, x.dtype)
    return g, d, first + offset, inside


@triton.jit
def _line_gradient_sums(
    tensors, outputs, values, place, split, splits, shape, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Sums of g and g (x - mean) of each line [LINES] over this program's tiles. Writes what can be written then."""
    dv_ptr, dx_ptr = outputs
    mean, scale, _ = values
    sums = tl.zeros([ALONG, LINES] if LAST else [LINES, ALONG], mean.dtype)
    products = tl.zeros_like(sums)
    tile = split
    while tile < _tiles(shape, ALONG):
        g, d, element, inside = _gradient(
            None, None, tensors, values, tile, place, shape, ACTIVATION, EVEN, LAST, LINES, ALONG
        )
        if dv_ptr is not None:
            tl.store(dv_ptr + element, g.to(dv_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            dx = mul(g, _spread(scale, LAST))
            tl.store(dx_ptr + element, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        sums = add(sums, g)
        products = fma(g, d, products)
        tile += splits
    return _line_sum(sums, LAST), _line_sum(products, LAST)


@triton.jit
def _kept_gradient_sums(
    x, dy, tensors, dv_ptr, values, place, shape, ACTIVATION: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """The same of a part, from its tiles; and its tiles of g in the dtype of dy, to be kept."""
    mean, _, _ = values
    sums = _gathered(tl.zeros([ALONG, LINES] if LAST else [LINES, ALONG], mean.dtype), LAST, VECTOR)
    products = tl.zeros_like(sums)
    kept = ()
    for tile in tl.static_range(TILES):
        g, d, element, inside = _gradient(
            x[tile], dy[tile], tensors, values, tile, place, shape, ACTIVATION,
            EVEN or tile < FULL, LAST, LINES, ALONG,
        )  # fmt: skip
        if dv_ptr is not None:
            tl.store(dv_ptr + element, g.to(dv_ptr.dtype.element_ty), mask=inside)
        sums = _with(sums, g, LAST, VECTOR)
        products = _with_product(products, g, d, LAST, VECTOR)
        g = dy[tile] if ACTIVATION is None else packed(g, dy[tile], shape[1])
        kept = kept + (g,)  # noqa: RUF005
    return kept, _line_sum(sums, LAST), _line_sum(products, LAST)


@triton.jit
def _unit_gradient_means(b, w, rstd, count, width, UNITS: tl.constexpr, LINES: tl.constexpr):
    """(-rstd B, -rstd^2 W), the two values of a unit that dx needs, at each of its lines.

    b, w: weight dbias and weight dweight of lines, 0 at those that are not there.
    """
    b = _unit_sum(b, width, UNITS, LINES)
    w = _unit_sum(w, width, UNITS, LINES)
    return -rstd * b / count, -rstd * rstd * w / count


@triton.jit
def _dx(g, d, values, means, LAST: tl.constexpr):
    _, scale, _ = values
    b, w = means
    return fma(g, _spread(scale, LAST), fma(d, _spread(w, LAST), _spread(b, LAST)))


@triton.jit
def _dx_tiles(
    tensors, dx_ptr, values, means, place, split, splits, shape, ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    tile = _tiles(shape, ALONG) - 1 - split
    while tile >= 0:
        g, d, element, inside = _gradient(
            None, None, tensors, values, tile, place, shape, ACTIVATION, EVEN, LAST, LINES, ALONG
        )
        dx = _dx(g, d, values, means, LAST)
        tl.store(dx_ptr + element, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        tile -= splits


@triton.jit
def whole_backward(
    dy_ptr,  # fp64, fp32, fp16 or bf16, laid out as x
    x_ptr,
    residual_ptr,  # forward's, where the activation needs it and there are no signs; else None
    signs_ptr,
    dv_ptr,  # any of those, laid out as x, or None: the gradient of v, which is the residual's
    dx_ptr,  # any of those, laid out as x
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    dweight_ptr,  # fp32 (fp64) [batches x lines]: sum g xhat of each line
    dbias_ptr,  # as dweight: sum g
    count: tl.float64,  # elements of a unit
    eps: tl.float64,
    outer,
    inner_vectors,
    segments,
    channels,
    repeat,
    width,
    block,
    ACTIVATION: tl.constexpr,
    REREAD: tl.constexpr,  # registers have no room but for g, and x is read twice
    UNITS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    FULL: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    LINES: tl.constexpr,
    ALONG: tl.constexpr,
):
    """Everything, a block of whole units a program. Arguments as in ``whole_forward``."""
    lines, along, block = _extents(outer, inner_vectors, block, VECTOR, LAST)
    shape = (lines, along, segments)
    place = _whole_place(block)
    split = 0
    unit, _, there = _indices(
        _part(place, 0, PARTS, LINES), shape, channels, repeat, width, UNITS, LAST, LINES
    )
    mean, rstd = _statistics_of(mean_ptr, var_ptr, eps, unit, there, UNITS)
    tensors = (dy_ptr, x_ptr, residual_ptr, signs_ptr)
    dy, x, g = (), (), ()  # of each part, its tiles
    for part in tl.static_range(PARTS if TILES else 0):
        own = _part(place, part, PARTS, LINES)
        dy = dy + (_keep(dy_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
        if part == 0 or not REREAD:
            x = x + (_keep(x_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
    b = tl.zeros_like(mean)
    w = tl.zeros_like(mean)
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        _, channel, there = _indices(own, shape, channels, repeat, width, UNITS, LAST, LINES)
        values = _affine(mean, rstd, weight_ptr, bias_ptr, channel, there)
        if TILES:
            if REREAD and part + 1 < PARTS:  # on their way while this part is summed
                ahead = _part(place, part + 1, PARTS, LINES)
                x = x + (_keep(x_ptr, ahead, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
            kept, dbias, dweight = _kept_gradient_sums(
                x[part], dy[part], tensors, dv_ptr, values, own, shape, ACTIVATION,
                TILES, FULL, EVEN, LAST, VECTOR, LINES, ALONG,
            )  # fmt: skip
            g = g + (kept,)  # noqa: RUF005
        else:
            dbias, dweight = _line_gradient_sums(
                tensors, (dv_ptr, None), values, own, split, _one(), shape,
                ACTIVATION, EVEN, LAST, LINES, ALONG,
            )  # fmt: skip
        dweight *= rstd
        batch, first_line, _ = own
        index = batch * shape[0] + first_line + tl.arange(0, LINES)
        tl.store(dweight_ptr + index, dweight, mask=there)
        tl.store(dbias_ptr + index, dbias, mask=there)
        weight = _value(weight_ptr, channel, there, 1.0, mean)
        b += tl.where(there, weight * dbias, 0.0)
        w += tl.where(there, weight * dweight, 0.0)
    count = tl.full([1], count, mean.dtype)
    means = _unit_gradient_means(b, w, rstd, count, width, UNITS, LINES)
    # What was computed from these would else be kept in registers until it is wanted again.
    if REREAD:
        place = (renamed(place[0]), place[1], place[2])
    else:
        mean = renamed(mean)
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        _, channel, there = _indices(own, shape, channels, repeat, width, UNITS, LAST, LINES)
        values = _affine(mean, rstd, weight_ptr, bias_ptr, channel, there)
        if TILES:
            again = _keep(x_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG) if REREAD else x[part]
            for tile in tl.static_range(TILES):
                first, offset, inside, _ = _tile(tile, own, shape, EVEN or tile < FULL, LAST, LINES, ALONG)
                d = difference(renamed(again[tile]), _spread(mean, LAST))
                dx = _dx(upcast(g[part][tile]).to(d.dtype), d, values, means, LAST)
                tl.store(dx_ptr + first + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        else:
            _dx_tiles(
                tensors, dx_ptr, values, means, own, split, _one(), shape,
                ACTIVATION, EVEN, LAST, LINES, ALONG,
            )  # fmt: skip


@triton.jit
def gradient_sums(
    dy_ptr,
    x_ptr,
    residual_ptr,
    signs_ptr,
    dv_ptr,
    dx_ptr,  # evaluation: rstd weight g, as the statistics do not depend on x; else None
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,  # fp32 (fp64) [splits, batches x lines]: sum of g
    product_ptr,  # as sum: sum of g (x - mean)
    eps: tl.float64,
    outer,
    inner_vectors,
    segments,
    channels,
    repeat,
    width,
    batches,
    block,
    splits,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    LINES: tl.constexpr,
    ALONG: tl.constexpr,
):
    """The first pass. Grid: (batches x splits x blocks of lines,)."""
    lines, along, block = _extents(outer, inner_vectors, block, VECTOR, LAST)
    shape = (lines, along, segments)
    place, split = _place(shape, block, splits)
    unit, channel, there = _indices(place, shape, channels, repeat, width, 0, LAST, LINES)
    mean, rstd = _statistics_of(mean_ptr, var_ptr, eps, unit, there, 0)
    values = _affine(mean, rstd, weight_ptr, bias_ptr, channel, there)
    tensors = (dy_ptr, x_ptr, residual_ptr, signs_ptr)
    total, product = _line_gradient_sums(
        tensors, (dv_ptr, dx_ptr), values, place, split, splits, shape,
        ACTIVATION, EVEN, LAST, LINES, ALONG,
    )  # fmt: skip
    batch, first_line, _ = place
    index = split * (batches * shape[0]) + batch * shape[0] + first_line + tl.arange(0, LINES)
    tl.store(sum_ptr + index, total, mask=there)
    tl.store(product_ptr + index, product, mask=there)


@triton.jit
def merge_gradient_sums(
    sum_ptr,  # what ``gradient_sums`` wrote
    product_ptr,
    var_ptr,
    weight_ptr,
    dweight_ptr,  # [all_lines]
    dbias_ptr,
    b_ptr,  # [units]: rstd B, for ``gradient_apply``; or None
    w_ptr,  # [units]: rstd^2 W
    count_ptr,  # [1]: elements of a unit, or None where they come as a number
    count: tl.float64,
    eps: tl.float64,
    all_lines,
    splits,
    channels,
    repeat,
    width,
    block,
    UNITS: tl.constexpr,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """From partial sums to the gradients of each line and what dx needs. Grid: (blocks of whole units,)."""
    line, there = _lines((0, tl.program_id(0) * block, block), all_lines, LINES)
    unit = line // width
    rstd = _rstd(tl.load(var_ptr + unit, mask=there, other=1.0), eps)
    dbias = tl.zeros_like(rstd)
    dweight = tl.zeros_like(rstd)
    start = splits * 0
    while start < splits:
        split = start + tl.arange(0, SPLITS)
        index = split[:, None] * all_lines + line[None, :]
        inside = (split < splits)[:, None] & there[None, :]
        dbias += tl.sum(tl.load(sum_ptr + index, mask=inside, other=0.0), axis=0)
        dweight += tl.sum(tl.load(product_ptr + index, mask=inside, other=0.0), axis=0)
        start += SPLITS
    dweight *= rstd
    tl.store(dweight_ptr + line, dweight, mask=there)
    tl.store(dbias_ptr + line, dbias, mask=there)
    if b_ptr is not None:
        if count_ptr is not None:
            count = tl.load(count_ptr)
        weight = _value(weight_ptr, line // repeat % channels, there, 1.0, rstd)
        elements = tl.full(rstd.shape, count, rstd.dtype)
        b, w = tl.where(there, weight * dbias, 0.0), tl.where(there, weight * dweight, 0.0)
        b, w = _unit_gradient_means(b, w, rstd, elements, width, UNITS, LINES)
        leads = there & (line % width == 0)
        tl.store(b_ptr + unit, b, mask=leads)
        tl.store(w_ptr + unit, w, mask=leads)


@triton.jit
def gradient_apply(
    dy_ptr,  # or, with ACTIVATION None, what ``gradient_sums`` wrote to dv
    x_ptr,
    dx_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    b_ptr,
    w_ptr,
    eps: tl.float64,
    outer,
    inner_vectors,
    segments,
    channels,
    repeat,
    width,
    block,
    splits,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    LINES: tl.constexpr,
    ALONG: tl.constexpr,
):
    """dx: the second pass. Grid: (batches x splits x blocks of lines,)."""
    lines, along, block = _extents(outer, inner_vectors, block, VECTOR, LAST)
    shape = (lines, along, segments)
    place, split = _place(shape, block, splits)
    unit, channel, there = _indices(place, shape, channels, repeat, width, 0, LAST, LINES)
    mean, rstd = _statistics_of(mean_ptr, var_ptr, eps, unit, there, 0)
    values = _affine(mean, rstd, weight_ptr, bias_ptr, channel, there)
    means = (
        tl.load(b_ptr + unit, mask=there, other=0.0),
        tl.load(w_ptr + unit, mask=there, other=0.0),
    )
    _dx_tiles(
        (dy_ptr, x_ptr, None, None), dx_ptr, values, means, place, split, splits, shape,
        ACTIVATION, EVEN, LAST, LINES, ALONG,
    )  # fmt: skip
