"""Values per unit and values per line, and how each is made of the other.

A unit has one mean and one variance; each of its lines has a channel, with a weight and a bias. Channels first, a
program with whole units has one unit or takes each line for one, and sums are plain. Channels last, the lines of a tile
are its vectors: a block of 64 channels may be 6 units of 10 and the rest masked, so that units begin within vectors.

A RUN is the vector of neighbouring lines that one thread has. It is chosen narrow enough to touch no more than two
units, as runs of 4 do units of 10:

    lines     0  1  2  3 | 4  5  6  7 | 8  9 10 11 | 12 13 14 15 | 16 17 18 19
    unit      0  0  0  0   0  0  0  0   0  0  1  1    1  1  1  1    1  1  1  1
    run       0            1            2             3             4
    sums      (0, -)       (0, -)       (0, 1)        (1, -)        (1, -)

So each thread sums a run by itself, to two sums, before threads exchange anything; a unit gathers the sums of the runs
that it touches, and each line of a run selects one of two values.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..fastmath import upcast
from ..ptxas import to_vector_register
from .geometry import line_sum, lines_of


class Units(NamedTuple):
    """The units of a program: constants."""

    slots: int  # how many, rounded up to a power of 2; 0: every line is one
    run: int = 1  # lines; channels first, 1
    touched: int = 1  # runs that a unit touches, rounded up to a power of 2


class Moments(NamedTuple):
    """Pointers to fp32 (fp64 for fp64 tensors) [units]."""

    mean: tl.tensor
    var: tl.tensor  # biased


class Affine(NamedTuple):
    """Pointers to any dtype [channels], or None."""

    weight: tl.tensor
    bias: tl.tensor


class Runs(NamedTuple):
    unit: tl.tensor  # of the first line of a run
    in_first: tl.tensor  # which lines of a run are of that unit, and not of the next [runs, run]


class Values(NamedTuple):
    """Of each unit or line, with which v = (x - mean) scale + bias."""

    mean: tl.tensor
    scale: tl.tensor
    bias: tl.tensor


# --- which units and channels -----------------------------------------------------------------------------


@triton.jit
def channels_of(place, shape, tile: tl.constexpr, units: tl.constexpr):
    """The channel of each line, where each is its own, and whether the line exists."""
    line, exists = lines_of(place, shape.lines, tile.lines)
    if tile.last:
        channel = line
    elif units.slots == 1:
        channel = place.first_line % shape.channels + tl.arange(0, tile.lines)
    else:
        channel = line % shape.channels
    return channel, exists


@triton.jit
def units_and_channels(place, shape, tile: tl.constexpr):
    """Unit and channel of each line, and whether the line exists, for a program that may have parts of units."""
    line, exists = lines_of(place, shape.lines, tile.lines)
    unit = (place.batch * shape.lines + line) // shape.width
    if tile.repeated:
        channel = unit
    elif tile.last:
        channel = line
    else:
        channel = line % shape.channels
    return unit, channel, exists


@triton.jit
def units_of(place, lines, width, units: tl.constexpr, LINES: tl.constexpr):
    """The units of a program with whole ones, and which of them exist."""
    if units.slots == 1:
        return tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) + tl.arange(0, 1), tl.full(
            [1], True, tl.int1
        )
    elif units.slots == 0:
        line, exists = lines_of(place, lines, LINES)
        return place.batch * lines + line, exists
    else:
        line = tl.arange(0, units.slots) * width
        exists = (line < place.block) & (place.first_line + line < lines)
        return (place.batch * lines + place.first_line) // width + tl.arange(0, units.slots), exists


# --- from units to lines ----------------------------------------------------------------------------------


@triton.jit
def _runs(width, run: tl.constexpr, LINES: tl.constexpr):
    first = tl.arange(0, LINES // run) * run
    unit = first // width
    return Runs(unit, first[:, None] + tl.arange(0, run)[None, :] < ((unit + 1) * width)[:, None])


@triton.jit
def at_lines(v, width, units: tl.constexpr, LINES: tl.constexpr):
    """Values of units, for each of their lines."""
    if units.slots <= 1:
        return v
    else:
        RUN: tl.constexpr = units.run
        runs = _runs(width, RUN, LINES)
        if RUN == 1:
            return tl.gather(v, tl.minimum(runs.unit, units.slots - 1), 0)
        else:
            both = tl.minimum(runs.unit[:, None] + tl.arange(0, 2)[None, :], units.slots - 1)
            found = tl.gather(v, tl.reshape(both, [LINES // RUN * 2]), 0)
            first, second = tl.split(tl.reshape(found, [LINES // RUN, 2]))
            return tl.reshape(tl.where(runs.in_first, first[:, None], second[:, None]), [LINES])


# --- from lines to units ----------------------------------------------------------------------------------


@triton.jit
def _sums_over_runs(x, width, units: tl.constexpr):
    """Sums of a tile [along, lines] over units of any width."""
    ALONG: tl.constexpr = x.shape[0]
    LINES: tl.constexpr = x.shape[1]
    SLOTS: tl.constexpr = units.slots
    TOUCHED: tl.constexpr = units.touched
    RUN: tl.constexpr = units.run
    RUNS: tl.constexpr = LINES // RUN
    SUMS: tl.constexpr = 1 if RUN == 1 else 2  # of a run
    if RUN == 1:
        sums = x
    else:
        in_first = _runs(width, RUN, LINES).in_first
        in_first = in_first[None, :, :]
        x = tl.reshape(x, [ALONG, RUNS, RUN])
        sums = tl.join(tl.sum(tl.where(in_first, x, 0.0), axis=2), tl.sum(tl.where(in_first, 0.0, x), axis=2))
    # A unit gathers a row of sums: of a run that begins before the unit, the second one.
    first = (tl.arange(0, SLOTS) * width)[:, None, None]
    run = first // RUN + tl.arange(0, TOUCHED)[None, None, :]
    inside = (run * RUN < first + width) & (run < RUNS)
    index = run * SUMS + (run * RUN < first).to(tl.int32)
    index = tl.where(inside, index, 0) + tl.arange(0, ALONG)[None, :, None] * (RUNS * SUMS)
    index = tl.reshape(index, [SLOTS * ALONG * TOUCHED])
    row = tl.gather(tl.reshape(sums, [ALONG * RUNS * SUMS]), index, 0)
    row = tl.where(inside, tl.reshape(row, [SLOTS, ALONG, TOUCHED]), 0.0)
    return tl.sum(tl.reshape(row, [SLOTS, ALONG * TOUCHED]), axis=1)


@triton.jit
def sums_of_lines(v, width, units: tl.constexpr):
    """Sums over units of values per line, which are 0 for lines that do not exist."""
    if units.slots == 0:
        return v
    elif units.slots == 1:
        return tl.full([1], tl.sum(v, axis=0), v.dtype)
    else:
        return _sums_over_runs(v[None, :], width, units)


@triton.jit
def sums_of_tile(x, width, tile: tl.constexpr, units: tl.constexpr):
    """Sums over units of a tile, which is 0 in lines that do not exist."""
    if units.slots == 1:
        return tl.full([1], tl.sum(x), x.dtype)
    elif units.slots == 0 or not tile.last:
        return sums_of_lines(line_sum(x, tile), width, units)
    else:
        return _sums_over_runs(x, width, units)


# --- mean, scale and bias ---------------------------------------------------------------------------------


@triton.jit
def value(ptr, index, exists, default, like):
    """``ptr[index]`` in the dtype of ``like``, or the default where there is no pointer."""
    if ptr is None:
        return tl.full(index.shape, default, like.dtype)
    else:
        return upcast(tl.load(ptr + index, mask=exists, other=default)).to(like.dtype)


@triton.jit
def rstd_of(var, eps):
    return tl.rsqrt(var + tl.full(var.shape, eps, var.dtype))


@triton.jit
def load_moments(moments, eps, unit, exists):
    """Mean and 1 / sqrt(var + eps) of units."""
    mean = tl.load(moments.mean + unit, mask=exists, other=0.0)
    rstd = rstd_of(tl.load(moments.var + unit, mask=exists, other=1.0), eps)
    return (to_vector_register(mean) if unit.shape[0] == 1 else mean), rstd


@triton.jit
def with_affine(mean, rstd, affine, channel, exists):
    """The values with the weights and biases of these channels."""
    scale = rstd * value(affine.weight, channel, exists, 1.0, mean)
    return Values(mean, scale, value(affine.bias, channel, exists, 0.0, mean))


@triton.jit
def unit_values(mean, rstd, affine, unit, exists, tile: tl.constexpr):
    """The values of units; where each line is a channel, still without weight and bias."""
    if tile.repeated:
        return with_affine(mean, rstd, affine, unit, exists)
    else:
        return Values(mean, rstd, tl.zeros_like(mean))


@triton.jit
def line_values(of_units, affine, place, shape, tile: tl.constexpr, units: tl.constexpr):
    """The values of each line, from those of units."""
    mean = at_lines(of_units.mean, shape.width, units, tile.lines)
    scale = at_lines(of_units.scale, shape.width, units, tile.lines)
    if tile.repeated:
        return Values(mean, scale, at_lines(of_units.bias, shape.width, units, tile.lines))
    else:
        channel, exists = channels_of(place, shape, tile, units)
        return with_affine(mean, scale, affine, channel, exists)


@triton.jit
def split_values(moments, affine, eps, place, shape, tile: tl.constexpr):
    """The same for a program that may have parts of units; and their units, and which lines exist."""
    unit, channel, exists = units_and_channels(place, shape, tile)
    mean, rstd = load_moments(moments, eps, unit, exists)
    return with_affine(mean, rstd, affine, channel, exists), unit, exists
