"""Mean and variance of lines and units.

Where tiles stay in registers: two passes, exact. The mean comes first, then the squares of deviations from it.

Where they do not: one pass, sums of x - shift and of its square. The shift is the mean of the program's first tile,
so nothing cancels, whatever the mean is: E[x^2] - E[x]^2 is off by 12 % at a mean of 1,000 and a variance of 1.

    mean = shift + sum(x - shift) / n        var = sum((x - shift)^2) / n - (mean - shift)^2

Moments of several programs, or of lines of a unit, are merged by the formula of Chan, Golub and LeVeque (1983).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..fastmath import add, difference, fma, upcast
from ..ptxas import rounded_product
from .geometry import (
    elements_of,
    line_sum,
    lines_of,
    load,
    part_of,
    plus,
    plus_product,
    spread,
    summed_at_once,
    tiles_of,
    vector_sums,
)
from .units import at_lines, sums_of_lines, sums_of_tile


class Running(NamedTuple):
    """Running statistics, which batch normalization updates: pointers to any dtype [units], or None."""

    mean: tl.tensor
    var: tl.tensor
    momentum: tl.tensor  # any dtype [1], or None where it comes as a number


class Partials(NamedTuple):
    """Pointers to the moments of each split, fp32 (fp64)."""

    mean: tl.tensor  # [splits, batches x lines]
    var: tl.tensor
    elements: tl.tensor  # [splits]: of a line in the split


# --- of tiles in registers --------------------------------------------------------------------------------


@triton.jit
def kept_moments(kept, place, shape, tile: tl.constexpr, units: tl.constexpr, plan: tl.constexpr):
    """Mean and (biased) variance of units, and the elements of a line. kept: of each part, its tiles as stored."""
    TILES: tl.constexpr = plan.tiles
    PARTS: tl.constexpr = plan.parts
    VECTOR: tl.constexpr = summed_at_once(tile) if units.slots == 1 else 1
    sums = vector_sums(upcast(kept[0][0]), VECTOR)
    for part in tl.static_range(PARTS):
        for number in tl.static_range(0 if part else 1, TILES):
            sums = plus(sums, upcast(kept[part][number]), VECTOR)
    along = shape.along * shape.segments if tile.segmented else shape.along
    count = tl.full([1], along, tl.int32).to(sums.dtype)
    elements = count * shape.width
    mean = sums_of_tile(sums, shape.width, tile, units) / elements
    center = spread(at_lines(mean, shape.width, units, tile.lines), tile)
    squares = tl.zeros_like(sums)
    for part in tl.static_range(PARTS):
        of_part = part_of(place, part, PARTS, tile)
        for number in tl.static_range(TILES):
            d = difference(kept[part][number], center)
            if not (tile.even or number < plan.full):
                d = tl.where(elements_of(number, of_part, shape, tile).inside, d, 0.0)
            squares = plus_product(squares, d, d, VECTOR)
    return mean, sums_of_tile(squares, shape.width, tile, units) / elements, count


# --- of tiles that are read one after another -------------------------------------------------------------


@triton.jit
def _first_deviation(x_ptr, at, tile: tl.constexpr):
    """x - shift of a program's first tile, and the shift, its mean.

    The shift is rounded as x is stored: loads can then put it where no element is, which deviates from it by 0.
    """
    x = upcast(load(x_ptr, at))
    shift = upcast((line_sum(x, tile) / at.along.to(x.dtype)).to(x_ptr.dtype.element_ty))
    d = x - spread(shift, tile)
    return (d if tile.even else tl.where(at.inside, d, 0.0)), shift


@triton.jit
def _deviation(x_ptr, shift, at, tile: tl.constexpr):
    center = spread(shift, tile)
    x = tl.load(x_ptr + at.lane + at.base, mask=at.inside, other=center.to(x_ptr.dtype.element_ty))
    return difference(x, center)


@triton.jit
def line_moments(x_ptr, place, split, splits, shape, tile: tl.constexpr):
    """Mean and (biased) variance of each line [lines] over this program's tiles, and how many elements that is."""
    at = elements_of(split, place, shape, tile)
    sums, shift = _first_deviation(x_ptr, at, tile)
    squares = sums * sums
    count = at.along
    number = split + splits
    while number < tiles_of(shape, tile):
        at_next = elements_of(number, place, shape, tile)
        d = _deviation(x_ptr, shift, at_next, tile)
        sums = add(sums, d)
        squares = fma(d, d, squares)
        count += at_next.along
        number += splits
    count = count.to(sums.dtype)
    off = line_sum(sums, tile) / count
    var = line_sum(squares, tile) / count - off * off
    return shift + off, tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL), count


# --- merged -----------------------------------------------------------------------------------------------


@triton.jit
def merged_parts(means, variances, parts: tl.constexpr):
    """Moments of each line of a part merged with those of the lines at the same place in the others."""
    if parts == 1:
        return means[0], variances[0]
    else:
        mean = tl.zeros_like(means[0])
        for part in tl.static_range(parts):
            mean += means[part]
        mean /= parts
        var = tl.zeros_like(mean)
        for part in tl.static_range(parts):
            d = means[part] - mean
            var += variances[part] + d * d
        return mean, var / parts


@triton.jit
def merged_lines(mean, var, exists, width, units: tl.constexpr):
    """Moments of lines of equal length merged to those of units."""
    if units.slots == 0:
        return mean, var
    else:
        share = 1.0 / width.to(mean.dtype)
        unit_mean = sums_of_lines(tl.where(exists, mean, 0.0), width, units) * share
        d = mean - at_lines(unit_mean, width, units, mean.shape[0])
        var = tl.where(exists, var + d * d, 0.0)
        return unit_mean, sums_of_lines(var, width, units) * share


@triton.jit
def merged_splits(partials, place, all_lines, splits, LINES: tl.constexpr, SPLITS: tl.constexpr):
    """Moments of each line over all splits, SPLITS of them at a time, and how many elements that is."""
    line, exists = lines_of(place, all_lines, LINES)
    shift = tl.load(partials.mean + line, mask=exists, other=0.0)  # of split 0: the means are close together
    total = tl.zeros([1], shift.dtype)
    off = tl.zeros_like(shift)
    squares = tl.zeros_like(shift)
    start = splits * 0
    while start < splits:
        split = start + tl.arange(0, SPLITS)
        count = tl.load(partials.elements + split, mask=split < splits, other=0.0)[:, None]
        index = split[:, None] * all_lines + line[None, :]
        inside = (split < splits)[:, None] & exists[None, :]
        d = tl.load(partials.mean + index, mask=inside, other=0.0) - shift[None, :]
        var = tl.load(partials.var + index, mask=inside, other=0.0)
        d = tl.where(count > 0, d, 0.0)  # an empty split says nothing about the mean
        total += tl.sum(count, axis=0)
        off += tl.sum(rounded_product(d, count), axis=0)
        squares += tl.sum(rounded_product(var + d * d, count), axis=0)
        start += SPLITS
    off /= total
    var = squares / total - off * off
    return shift + off, tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL), total


# --- running statistics -----------------------------------------------------------------------------------


@triton.jit
def update_running(running, momentum, unit, exists, mean, var, count):
    """running = (1 - momentum) running + momentum new, with the unbiased variance.

    Each unit once: a value that one thread reads after another has written it would be updated twice.
    """
    count += tl.zeros_like(mean)
    exists &= (
        count > 1
    )  # one value has no variance, and none has no mean: processes that all got an empty batch
    if running.momentum is not None:
        momentum = upcast(tl.load(running.momentum)).to(mean.dtype)
    share = tl.full(mean.shape, momentum, mean.dtype)
    if running.mean is not None:
        _update(running.mean + unit, exists, share, mean)
    if running.var is not None:
        _update(running.var + unit, exists, share, var * (count / (count - 1.0)))


@triton.jit
def _update(ptr, exists, share, new):
    old = upcast(tl.load(ptr, mask=exists)).to(new.dtype)
    value = (1.0 - share) * old + share * new
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=exists)
