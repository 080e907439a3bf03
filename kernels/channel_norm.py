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

Instructions are predicted to take less time than memory on an A100, an H100 and a B200 in all forms that are inspected.
Registers are the narrow place: what the two passes share, the compiler would keep in them (``renamed``), what they hold
in 16 bits, in 32 (``packed``), and the terms of sums until the last moment (``settled``).

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
from .fastmath import add, difference, fma, in_lanes, mul, packed, product, renamed, settled, total, upcast

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
    """Of a tile: where the elements of the first one lie, how far behind them its own do, which are inside, and how
    many along. In that order, what threads differ in is the same of all tiles."""
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
        first = step * lines + line
        offset = (segment.to(tl.int64) * along + start) * lines + first_line
    else:
        first = line * along + step
        offset = (segment.to(tl.int64) * lines + first_line) * along + start
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
def _channels(place, shape, channels, UNITS: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr):
    """The channel of each line, where each is of its own, and whether it is there."""
    lines, _, _ = shape
    _, first_line, _ = place
    line, there = _lines(place, lines, LINES)
    if LAST:
        channel = line
    elif UNITS == 1:
        channel = first_line % channels + tl.arange(0, LINES)
    else:
        channel = line % channels
    return channel, there


@triton.jit
def _indices(place, shape, channels, width, REPEATED: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr):
    """Unit and channel of each line, and whether it is there."""
    lines, _, _ = shape
    batch, _, _ = place
    line, there = _lines(place, lines, LINES)
    unit = (batch * lines + line) // width
    if REPEATED:
        channel = unit
    else:
        channel, _ = _channels(place, shape, channels, 0, LAST, LINES)
    return unit, channel, there


@triton.jit
def _units(place, shape, width, UNITS: tl.constexpr, LINES: tl.constexpr):
    """The units of a program with whole ones, and which of them are there."""
    lines, _, _ = shape
    batch, first_line, block = place
    if UNITS == 1:
        return _unit_of_program() + tl.arange(0, 1), tl.full([1], True, tl.int1)
    elif UNITS == 0:
        line, there = _lines(place, lines, LINES)
        return batch * lines + line, there
    else:
        line = tl.arange(0, UNITS) * width
        there = (line < block) & (first_line + line < lines)
        return (batch * lines + first_line) // width + tl.arange(0, UNITS), there


@triton.jit
def _rstd(var, eps):
    return tl.rsqrt(var + tl.full(var.shape, eps, var.dtype))


@triton.jit
def _statistics_of(mean_ptr, var_ptr, eps, unit, there, UNITS: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of units."""
    mean = tl.load(mean_ptr + unit, mask=there, other=0.0)
    rstd = _rstd(tl.load(var_ptr + unit, mask=there, other=1.0), eps)
    return (in_lanes(mean) if UNITS == 1 else mean), rstd


@triton.jit
def _affine(mean, rstd, weight_ptr, bias_ptr, channel, there):
    """(mean, scale, bias) of each line, with which v = (x - mean) scale + bias."""
    scale = rstd * _value(weight_ptr, channel, there, 1.0, mean)
    return mean, scale, _value(bias_ptr, channel, there, 0.0, mean)


# A run is what a thread has of neighbouring lines, a vector (channels last), if units are wide enough for it to touch
# no more than two of them. Threads sum the lines of a run by themselves, to two sums, before they exchange anything,
# and get two values of a run, of which each of its lines has one.


@triton.jit
def _runs(width, RUN: tl.constexpr, LINES: tl.constexpr):
    """Of each run: the unit of its first line, and which of its lines are of that, not of the next [runs, RUN]."""
    first = tl.arange(0, LINES // RUN) * RUN
    unit = first // width
    return unit, first[:, None] + tl.arange(0, RUN)[None, :] < ((unit + 1) * width)[:, None]


@triton.jit
def _unit_sums(tile, width, UNITS: tl.constexpr, RUN: tl.constexpr, TOUCHED: tl.constexpr):
    """Sums of a tile [ALONG, LINES] over units [UNITS], which may have any width."""
    ALONG: tl.constexpr = tile.shape[0]
    LINES: tl.constexpr = tile.shape[1]
    RUNS: tl.constexpr = LINES // RUN
    SUMS: tl.constexpr = 1 if RUN == 1 else 2  # of a run
    if RUN == 1:
        sums = tile
    else:
        _, own = _runs(width, RUN, LINES)
        own = own[None, :, :]
        tile = tl.reshape(tile, [ALONG, RUNS, RUN])
        sums = tl.join(tl.sum(tl.where(own, tile, 0.0), axis=2), tl.sum(tl.where(own, 0.0, tile), axis=2))
    # The sums of the runs that a unit touches are gathered to a row: of one that begins before the unit, the second.
    first = (tl.arange(0, UNITS) * width)[:, None, None]
    run = first // RUN + tl.arange(0, TOUCHED)[None, None, :]
    inside = (run * RUN < first + width) & (run < RUNS)
    index = run * SUMS + (run * RUN < first).to(tl.int32)
    index = tl.where(inside, index, 0) + tl.arange(0, ALONG)[None, :, None] * (RUNS * SUMS)
    row = tl.gather(tl.reshape(sums, [ALONG * RUNS * SUMS]), tl.reshape(index, [UNITS * ALONG * TOUCHED]), 0)
    row = tl.where(inside, tl.reshape(row, [UNITS, ALONG, TOUCHED]), 0.0)
    return tl.sum(tl.reshape(row, [UNITS, ALONG * TOUCHED]), axis=1)


@triton.jit
def _at_lines(v, width, UNITS: tl.constexpr, RUN: tl.constexpr, LINES: tl.constexpr):
    """Values of units at each of their lines."""
    if UNITS <= 1:
        return v
    else:
        unit, own = _runs(width, RUN, LINES)
        if RUN == 1:
            return tl.gather(v, tl.minimum(unit, UNITS - 1), 0)
        else:
            both = tl.minimum(unit[:, None] + tl.arange(0, 2)[None, :], UNITS - 1)
            found = tl.gather(v, tl.reshape(both, [LINES // RUN * 2]), 0)
            here, after = tl.split(tl.reshape(found, [LINES // RUN, 2]))
            return tl.reshape(tl.where(own, here[:, None], after[:, None]), [LINES])


@triton.jit
def _line_unit_sums(v, width, UNITS: tl.constexpr, RUN: tl.constexpr, TOUCHED: tl.constexpr):
    """Sums over units of values of lines, which are 0 at those that are not there."""
    if UNITS == 0:
        return v
    elif UNITS == 1:
        return tl.full([1], tl.sum(v, axis=0), v.dtype)
    else:
        return _unit_sums(v[None, :], width, UNITS, RUN, TOUCHED)


@triton.jit
def _tile_unit_sums(
    tile, width, UNITS: tl.constexpr, RUN: tl.constexpr, TOUCHED: tl.constexpr, LAST: tl.constexpr
):
    """Sums over units of a tile, which is 0 at lines that are not there."""
    if UNITS == 1:
        return tl.full([1], tl.sum(tile), tile.dtype)
    elif UNITS == 0 or not LAST:
        return _line_unit_sums(_line_sum(tile, LAST), width, UNITS, RUN, TOUCHED)
    else:
        return _unit_sums(tile, width, UNITS, RUN, TOUCHED)


@triton.jit
def _unit_values(mean, rstd, weight_ptr, bias_ptr, unit, there, REPEATED: tl.constexpr):
    """(mean, scale, bias) of units, where weight and bias are 1 and 0 if each of their lines has its own."""
    if REPEATED:
        return _affine(mean, rstd, weight_ptr, bias_ptr, unit, there)
    else:
        return mean, rstd, tl.zeros_like(mean)


@triton.jit
def _line_values(
    values, weight_ptr, bias_ptr, place, shape, channels, width, REPEATED: tl.constexpr,
    UNITS: tl.constexpr, RUN: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """(mean, scale, bias) of each line, from what ``_unit_values`` gave."""
    mean, scale, bias = values
    mean = _at_lines(mean, width, UNITS, RUN, LINES)
    scale = _at_lines(scale, width, UNITS, RUN, LINES)
    if REPEATED:
        return mean, scale, _at_lines(bias, width, UNITS, RUN, LINES)
    else:
        channel, there = _channels(place, shape, channels, UNITS, LAST, LINES)
        return _affine(mean, scale, weight_ptr, bias_ptr, channel, there)


@triton.jit
def _unit_moments(
    mean, var, there, width,
    UNITS: tl.constexpr, RUN: tl.constexpr, TOUCHED: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Moments of lines of equal length merged to those of units."""
    if UNITS == 0:
        return mean, var
    else:
        share = 1.0 / width.to(mean.dtype)
        unit_mean = _line_unit_sums(tl.where(there, mean, 0.0), width, UNITS, RUN, TOUCHED) * share
        d = mean - _at_lines(unit_mean, width, UNITS, RUN, LINES)
        var = tl.where(there, var + d * d, 0.0)
        return unit_mean, _line_unit_sums(var, width, UNITS, RUN, TOUCHED) * share


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

    index, there: of units, each once: what is read and written in turn would be updated twice. count: elements of one.
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
    kept, place, shape, width, UNITS: tl.constexpr, RUN: tl.constexpr, TOUCHED: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Mean and (biased) variance of units, one after the other; and the elements of a line."""
    _, along, segments = shape
    sums = _gathered(upcast(kept[0][0]), LAST, VECTOR)
    for part in tl.static_range(PARTS):
        for tile in tl.static_range(0 if part else 1, TILES):
            sums = _with(sums, upcast(kept[part][tile]), LAST, VECTOR)
    count = tl.full([1], along if segments is None else along * segments, tl.int32).to(sums.dtype)
    elements = count * width
    mean = _tile_unit_sums(sums, width, UNITS, RUN, TOUCHED, LAST) / elements
    center = _spread(_at_lines(mean, width, UNITS, RUN, LINES), LAST)
    squares = tl.zeros_like(sums)
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        for tile in tl.static_range(TILES):
            d = difference(kept[part][tile], center)
            if not (EVEN or tile < FULL):
                _, _, inside, _ = _tile(tile, own, shape, EVEN, LAST, LINES, ALONG)
                d = tl.where(inside, d, 0.0)
            squares = _with_product(squares, d, d, LAST, VECTOR)
    return mean, _tile_unit_sums(squares, width, UNITS, RUN, TOUCHED, LAST) / elements, count


@triton.jit
def _preactivation(d, values, residual_ptr, first, offset, inside, LAST: tl.constexpr):
    """(x - mean) scale + bias + residual, from d = x - mean."""
    _, scale, bias = values
    v = fma(d, _spread(scale, LAST), _spread(bias, LAST))
    if residual_ptr is not None:
        v = total(tl.load(residual_ptr + first + offset, mask=inside, other=0.0), v)
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
    width,  # lines of a unit
    block,  # lines of a program: whole units. LAST: in vectors
    ACTIVATION: tl.constexpr,
    REPEATED: tl.constexpr,  # all lines of a unit are of one channel (LAST); else each is of its own
    UNITS: tl.constexpr,  # of a program, rounded up to a power of 2; 0: every line is one
    RUN: tl.constexpr,  # neighbouring lines that touch no more than two units
    TOUCHED: tl.constexpr,  # runs that a unit touches, rounded up to a power of 2
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
    unit, whole = _units(place, shape, width, UNITS, LINES)
    if TILES:
        kept = ()
        for part in tl.static_range(PARTS):
            own = _part(place, part, PARTS, LINES)
            kept = kept + (_keep(x_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
        mean, var, count = _kept_moments(
            kept, place, shape, width, UNITS, RUN, TOUCHED, TILES, PARTS, FULL,
            EVEN, LAST, VECTOR if UNITS == 1 else 1, LINES, ALONG,
        )  # fmt: skip
    else:
        means, variances = (), ()
        for part in tl.static_range(PARTS):
            own = _part(place, part, PARTS, LINES)
            mean, var, count = _line_moments(x_ptr, own, split, _one(), shape, EVEN, LAST, LINES, ALONG)
            means, variances = means + (mean,), variances + (var,)  # noqa: RUF005
        mean, var = _merged_parts(means, variances, PARTS)
        _, there = _lines(_part(place, 0, PARTS, LINES), shape[0], LINES)
        mean, var = _unit_moments(mean, var, there, width // PARTS, UNITS, RUN, TOUCHED, LINES)
    tl.store(mean_ptr + unit, mean, mask=whole)
    tl.store(var_ptr + unit, var, mask=whole)
    running = (running_mean_ptr, running_var_ptr)
    _update_running(running, (momentum_ptr, momentum), unit, whole, mean, var, count * width)
    of_units = _unit_values(mean, _rstd(var, eps), weight_ptr, bias_ptr, unit, whole, REPEATED)
    tensors = (x_ptr, residual_ptr, y_ptr, signs_ptr)
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        values = _line_values(
            of_units, weight_ptr, bias_ptr, own, shape, channels, width, REPEATED, UNITS, RUN, LAST, LINES
        )
        if TILES:
            for tile in tl.static_range(TILES):
                _apply_tile(
                    kept[part][tile], tensors, values, tile, own, shape, ACTIVATION,
                    EVEN or tile < FULL, LAST, LINES, ALONG,
                )  # fmt: skip
        else:
            _apply_tiles(tensors, values, own, split, _one(), shape, ACTIVATION, EVEN, LAST, LINES, ALONG)


# Of one split the compiler would know, where a line is one tile, that the loop over further tiles never runs. Triton
# 3.6 aborts on a load in such a loop: it has no alignment of what is never computed.
@triton.jit(do_not_specialize=["splits"])
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
        off += tl.sum(product(d, count), axis=0)
        squares += tl.sum(product(var + d * d, count), axis=0)
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
    TOUCHED: tl.constexpr,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """From partial moments to those of units. Grid: (blocks of whole units,)."""
    line, there = _lines((0, tl.program_id(0) * block, block), all_lines, LINES)
    partials = (partial_mean_ptr, partial_var_ptr, partial_count_ptr)
    mean, var, count = _merged_moments(partials, line, there, splits, all_lines, SPLITS, LINES)
    mean, var = _unit_moments(mean, var, there, width, UNITS, 1, TOUCHED, LINES)
    unit, whole = _units((0, tl.program_id(0) * block, block), (all_lines, None, None), width, UNITS, LINES)
    tl.store(mean_ptr + unit, mean, mask=whole)
    tl.store(var_ptr + unit, var, mask=whole)
    running = (running_mean_ptr, running_var_ptr)
    _update_running(running, (momentum_ptr, momentum), unit, whole, mean, var, count * width)


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
    width,
    block,
    splits,
    REPEATED: tl.constexpr,
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
    unit, channel, there = _indices(place, shape, channels, width, REPEATED, LAST, LINES)
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
    """Sums of g and g (x - mean) over this program's tiles, as a tile. Writes what can be written then."""
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
    return sums, products


@triton.jit
def _kept_gradient_sums(
    x, dy, tensors, dv_ptr, values, place, shape, ACTIVATION: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, LAST: tl.constexpr, VECTOR: tl.constexpr, LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """The same of a part, from its tiles; and its tiles of g in the dtype of dy, to be kept.

    x, dy: the tiles, or None where registers have room for one of each.
    """
    mean, _, _ = values
    dy_ptr, _, _, _ = tensors
    of_dy = tl.zeros([1], dy_ptr.dtype.element_ty)
    sums = _gathered(tl.zeros([ALONG, LINES] if LAST else [LINES, ALONG], mean.dtype), LAST, VECTOR)
    products = tl.zeros_like(sums)
    kept = ()
    for tile in tl.static_range(TILES):
        g, d, element, inside = _gradient(
            None if x is None else x[tile], None if dy is None else dy[tile], tensors, values, tile, place, shape,
            ACTIVATION, EVEN or tile < FULL, LAST, LINES, ALONG,
        )  # fmt: skip
        if dv_ptr is not None:
            tl.store(dv_ptr + element, g.to(dv_ptr.dtype.element_ty), mask=inside)
        sums = _with(sums, g, LAST, VECTOR)
        products = _with_product(products, g, d, LAST, VECTOR)
        g = dy[tile] if ACTIVATION is None else packed(g, of_dy, shape[1])
        kept = kept + (g,)  # noqa: RUF005
        if dy is None:
            products = settled(products, shape[1])
            sums = settled(sums, shape[1])
    return kept, sums, products


@triton.jit
def _unit_gradient_means(b, w, rstd, count):
    """(-rstd B, -rstd^2 W), the two values of a unit that dx needs, from sums of scale g and scale g xhat over it."""
    return -b / count, -rstd * w / count


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
    dweight_ptr,  # any float dtype [batches x lines]: sum g xhat of each line; REPEATED: of each unit
    dbias_ptr,  # as dweight: sum g
    count: tl.float64,  # elements of a unit
    eps: tl.float64,
    outer,
    inner_vectors,
    segments,
    channels,
    width,
    block,
    ACTIVATION: tl.constexpr,
    REREAD: tl.constexpr,  # registers have no room but for g, and x is read twice
    REPEATED: tl.constexpr,
    UNITS: tl.constexpr,
    RUN: tl.constexpr,
    TOUCHED: tl.constexpr,
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
    unit, whole = _units(place, shape, width, UNITS, LINES)
    mean, rstd = _statistics_of(mean_ptr, var_ptr, eps, unit, whole, UNITS)
    of_units = _unit_values(mean, rstd, weight_ptr, bias_ptr, unit, whole, REPEATED)
    tensors = (dy_ptr, x_ptr, residual_ptr, signs_ptr)
    # Lines of several units leave no room for two tensors, if they also have an activation to go through.
    TILEWISE: tl.constexpr = REREAD and UNITS > 1 and ACTIVATION is not None
    dy, x, g = (), (), ()  # of each part, its tiles
    for part in tl.static_range(PARTS if TILES and not TILEWISE else 0):
        own = _part(place, part, PARTS, LINES)
        dy = dy + (_keep(dy_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
        if part == 0 or not REREAD:
            x = x + (_keep(x_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
    b = tl.zeros_like(mean)
    w = tl.zeros_like(mean)
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        values = _line_values(
            of_units, weight_ptr, bias_ptr, own, shape, channels, width, REPEATED, UNITS, RUN, LAST, LINES
        )
        if TILES:
            if REREAD and part + 1 < PARTS:  # on their way while this part is summed
                ahead = _part(place, part + 1, PARTS, LINES)
                x = x + (_keep(x_ptr, ahead, shape, TILES, FULL, EVEN, LAST, LINES, ALONG),)  # noqa: RUF005
            kept, sums, products = _kept_gradient_sums(
                None if TILEWISE else x[part], None if TILEWISE else dy[part],
                tensors, dv_ptr, values, own, shape, ACTIVATION,
                TILES, FULL, EVEN, LAST, VECTOR, LINES, ALONG,
            )  # fmt: skip
            g = g + (kept,)  # noqa: RUF005
        else:
            sums, products = _line_gradient_sums(
                tensors, (dv_ptr, None), values, own, split, _one(), shape,
                ACTIVATION, EVEN, LAST, LINES, ALONG,
            )  # fmt: skip
        if REPEATED:
            dbias = _tile_unit_sums(sums, width, UNITS, RUN, TOUCHED, LAST)
            dweight = _tile_unit_sums(products, width, UNITS, RUN, TOUCHED, LAST) * rstd
            _, scale, _ = of_units
            index, there = unit, whole
        else:
            line_rstd = _at_lines(rstd, width, UNITS, RUN, LINES)
            dbias = _line_sum(sums, LAST)
            dweight = _line_sum(products, LAST) * line_rstd
            # The weight is read once more, as there is no register to keep the scale in on all targets.
            channel, there = _channels(own, shape, channels, UNITS, LAST, LINES)
            scale = _value(weight_ptr, channel, there, 1.0, mean) * line_rstd
            batch, first_line, _ = own
            index = batch * shape[0] + first_line + tl.arange(0, LINES)
        tl.store(dweight_ptr + index, dweight, mask=there)
        tl.store(dbias_ptr + index, dbias, mask=there)
        dbias = tl.where(there, scale * dbias, 0.0)
        dweight = tl.where(there, scale * dweight, 0.0)
        if REPEATED:
            b, w = dbias, dweight
        else:
            b += _line_unit_sums(dbias, width, UNITS, RUN, TOUCHED)
            w += _line_unit_sums(dweight, width, UNITS, RUN, TOUCHED)
    count = tl.full([1], count, mean.dtype)
    b, w = _unit_gradient_means(b, w, rstd, count)
    means = _at_lines(b, width, UNITS, RUN, LINES), _at_lines(w, width, UNITS, RUN, LINES)
    # What was computed from these would else be kept in registers until it is wanted again.
    if REREAD:
        place = (renamed(place[0]), place[1], place[2])
    else:
        of_units = renamed(mean), of_units[1], of_units[2]
    for part in tl.static_range(PARTS):
        own = _part(place, part, PARTS, LINES)
        values = _line_values(
            of_units, weight_ptr, bias_ptr, own, shape, channels, width, REPEATED, UNITS, RUN, LAST, LINES
        )
        center, _, _ = values
        if TILES:
            again = _keep(x_ptr, own, shape, TILES, FULL, EVEN, LAST, LINES, ALONG) if REREAD else x[part]
            for tile in tl.static_range(TILES):
                first, offset, inside, _ = _tile(tile, own, shape, EVEN or tile < FULL, LAST, LINES, ALONG)
                d = difference(renamed(again[tile]), _spread(center, LAST))
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
    width,
    batches,
    block,
    splits,
    REPEATED: tl.constexpr,
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
    unit, channel, there = _indices(place, shape, channels, width, REPEATED, LAST, LINES)
    mean, rstd = _statistics_of(mean_ptr, var_ptr, eps, unit, there, 0)
    values = _affine(mean, rstd, weight_ptr, bias_ptr, channel, there)
    tensors = (dy_ptr, x_ptr, residual_ptr, signs_ptr)
    sums, products = _line_gradient_sums(
        tensors, (dv_ptr, dx_ptr), values, place, split, splits, shape,
        ACTIVATION, EVEN, LAST, LINES, ALONG,
    )  # fmt: skip
    batch, first_line, _ = place
    index = split * (batches * shape[0]) + batch * shape[0] + first_line + tl.arange(0, LINES)
    tl.store(sum_ptr + index, _line_sum(sums, LAST), mask=there)
    tl.store(product_ptr + index, _line_sum(products, LAST), mask=there)


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
    width,
    block,
    REPEATED: tl.constexpr,
    UNITS: tl.constexpr,
    TOUCHED: tl.constexpr,
    LINES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """From partial sums to the gradients of each line and what dx needs. Grid: (blocks of whole units,)."""
    place, shape = (0, tl.program_id(0) * block, block), (all_lines, None, None)
    line, there = _lines(place, all_lines, LINES)
    unit, whole = _units(place, shape, width, UNITS, LINES)
    rstd = _rstd(tl.load(var_ptr + unit, mask=whole, other=1.0), eps)
    dbias = tl.zeros([LINES], rstd.dtype)
    dweight = tl.zeros([LINES], rstd.dtype)
    start = splits * 0
    while start < splits:
        split = start + tl.arange(0, SPLITS)
        index = split[:, None] * all_lines + line[None, :]
        inside = (split < splits)[:, None] & there[None, :]
        dbias += tl.sum(tl.load(sum_ptr + index, mask=inside, other=0.0), axis=0)
        dweight += tl.sum(tl.load(product_ptr + index, mask=inside, other=0.0), axis=0)
        start += SPLITS
    if REPEATED:
        dbias = _line_unit_sums(dbias, width, UNITS, 1, TOUCHED)
        dweight = _line_unit_sums(dweight, width, UNITS, 1, TOUCHED) * rstd
        line, there = unit, whole
    else:
        dweight *= _at_lines(rstd, width, UNITS, 1, LINES)
    tl.store(dweight_ptr + line, dweight, mask=there)
    tl.store(dbias_ptr + line, dbias, mask=there)
    if b_ptr is not None:
        if count_ptr is not None:
            count = tl.load(count_ptr)
        scale = _value(weight_ptr, line % channels, there, 1.0, rstd)
        scale *= rstd if REPEATED else _at_lines(rstd, width, UNITS, 1, LINES)
        elements = tl.full(rstd.shape, count, rstd.dtype)
        b, w = tl.where(there, scale * dbias, 0.0), tl.where(there, scale * dweight, 0.0)
        if not REPEATED:
            b = _line_unit_sums(b, width, UNITS, 1, TOUCHED)
            w = _line_unit_sums(w, width, UNITS, 1, TOUCHED)
        b, w = _unit_gradient_means(b, w, rstd, elements)
        tl.store(b_ptr + unit, b, mask=whole)
        tl.store(w_ptr + unit, w, mask=whole)


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
    width,
    block,
    splits,
    REPEATED: tl.constexpr,
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
    unit, channel, there = _indices(place, shape, channels, width, REPEATED, LAST, LINES)
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
