"""The plan for split units: lines are spread over ``splits`` programs each, so that 3 channels fill a GPU as well as
3,000. Sums first, then a small merge, then a second pass:

    forward     statistics -> merge_statistics -> apply                              3 accesses (x; x, y)
    backward    gradient_sums -> merge_gradient_sums -> gradient_apply               5 (dy, x; dy, x, dx)

Program s of a line takes its tiles s, s + splits, s + 2 splits, and so on. It may have lines of several units, or parts
of them: it looks up mean and variance line by line. No atomics: the same input gives the same bits.

Evaluation needs no sums forward: ``apply`` alone. Its backward pass writes dx in ``gradient_sums``, as the statistics
do not depend on x.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .elementwise import (
    Backward,
    Forward,
    Gradients,
    Means,
    Sums,
    apply_tiles,
    gradient_means,
    gradient_sums_of_tiles,
    input_gradient_tiles,
)
from .geometry import Place, View, line_sum, lines_of, shape_of, split_place
from .moments import Partials, Running, line_moments, merged_lines, merged_splits, update_running
from .units import Affine, Moments, at_lines, rstd_of, split_values, sums_of_lines, units_of, value


class Merged(NamedTuple):
    """What the kernels that merge are given of lines: integers."""

    lines: tl.tensor  # of all batches
    splits: tl.tensor
    channels: tl.tensor
    width: tl.tensor
    block: tl.tensor  # lines of a program: whole units


class Merge(NamedTuple):
    """How a program goes through splits: constants."""

    lines: int  # a power of 2
    splits: int  # at a time
    repeated: bool  # as in ``Tile``


# --- forward ----------------------------------------------------------------------------------------------


# If Triton knew that splits is 1 and a line is one tile, it would know that the loop over further tiles never runs.
# Triton 3.6 aborts on a load in such a loop: it has no alignment of an address that is never computed.
@triton.jit(do_not_specialize=["splits"])
def statistics(x_ptr, partials: Partials, view: View, batches, splits, tile: tl.constexpr):
    """Moments of each line over a split's tiles. Reads x once. Grid: (batches x splits x blocks of lines,)."""
    shape, block = shape_of(view, tile)
    place, split = split_place(shape, block, splits)
    mean, var, count = line_moments(x_ptr, place, split, splits, shape, tile)
    line, exists = lines_of(place, shape.lines, tile.lines)
    index = split * (batches * shape.lines) + place.batch * shape.lines + line
    tl.store(partials.mean + index, mean, mask=exists)
    tl.store(partials.var + index, var, mask=exists)
    if place.batch + place.first_line == 0:
        tl.store(partials.elements + split, count)


@triton.jit
def merge_statistics(
    partials: Partials,  # what ``statistics`` wrote
    moments: Moments,  # written
    running: Running,  # updated
    momentum: tl.float64,
    merged: Merged,
    units: tl.constexpr,
    merge: tl.constexpr,
):
    """From partial moments to those of units. Grid: (blocks of whole units,)."""
    place = Place(0, tl.program_id(0) * merged.block, merged.block)
    lines_exist = lines_of(place, merged.lines, merge.lines).exist
    mean, var, count = merged_splits(partials, place, merged.lines, merged.splits, merge.lines, merge.splits)
    mean, var = merged_lines(mean, var, lines_exist, merged.width, units)
    unit, exists = units_of(place, merged.lines, merged.width, units, merge.lines)
    tl.store(moments.mean + unit, mean, mask=exists)
    tl.store(moments.var + unit, var, mask=exists)
    update_running(running, momentum, unit, exists, mean, var, count * merged.width)


@triton.jit
def apply(
    tensors: Forward,
    moments: Moments,  # any dtype: read
    affine: Affine,
    eps: tl.float64,
    view: View,
    splits,
    activation: tl.constexpr,
    tile: tl.constexpr,
):
    """y from known moments: the second pass in training, the only one in evaluation.

    Grid: (batches x splits x blocks of lines,).
    """
    shape, block = shape_of(view, tile)
    place, split = split_place(shape, block, splits)
    values = split_values(moments, affine, eps, place, shape, tile)[0]
    apply_tiles(tensors, values, place, split, splits, shape, activation, tile)


# --- backward ---------------------------------------------------------------------------------------------


@triton.jit
def gradient_sums(
    tensors: Backward,
    gradients: Gradients,  # dx in evaluation: rstd weight g; else None
    sums: Sums,  # fp32 (fp64) [splits, batches x lines]: dweight is the sum of g (x - mean)
    moments: Moments,
    affine: Affine,
    eps: tl.float64,
    view: View,
    batches,
    splits,
    activation: tl.constexpr,
    tile: tl.constexpr,
):
    """The first pass. Grid: (batches x splits x blocks of lines,)."""
    shape, block = shape_of(view, tile)
    place, split = split_place(shape, block, splits)
    values = split_values(moments, affine, eps, place, shape, tile)[0]
    g_sums, g_products = gradient_sums_of_tiles(
        tensors, gradients, values, place, split, splits, shape, activation, tile
    )
    exists = lines_of(place, shape.lines, tile.lines).exist
    index = split * (batches * shape.lines) + place.batch * shape.lines + place.first_line
    index += tl.arange(0, tile.lines)
    tl.store(sums.dbias + index, line_sum(g_sums, tile), mask=exists)
    tl.store(sums.dweight + index, line_sum(g_products, tile), mask=exists)


@triton.jit
def merge_gradient_sums(
    partials: Sums,  # what ``gradient_sums`` wrote
    var_ptr,
    weight_ptr,
    sums: Sums,  # any float dtype [lines]; ``merge.repeated``: [units]
    means: Means,  # [units], for ``gradient_apply``; or None
    elements_ptr,  # [1]: elements of a unit, or None where they come as a number
    elements: tl.float64,
    eps: tl.float64,
    merged: Merged,
    units: tl.constexpr,
    merge: tl.constexpr,
):
    """From partial sums to the gradients of each line and what dx needs. Grid: (blocks of whole units,)."""
    place = Place(0, tl.program_id(0) * merged.block, merged.block)
    line, exists = lines_of(place, merged.lines, merge.lines)
    unit, units_exist = units_of(place, merged.lines, merged.width, units, merge.lines)
    rstd = rstd_of(tl.load(var_ptr + unit, mask=units_exist, other=1.0), eps)
    LINES: tl.constexpr = merge.lines
    dbias = tl.zeros([LINES], rstd.dtype)
    dweight = tl.zeros([LINES], rstd.dtype)
    start = merged.splits * 0
    while start < merged.splits:
        split = start + tl.arange(0, merge.splits)
        index = split[:, None] * merged.lines + line[None, :]
        inside = (split < merged.splits)[:, None] & exists[None, :]
        dbias += tl.sum(tl.load(partials.dbias + index, mask=inside, other=0.0), axis=0)
        dweight += tl.sum(tl.load(partials.dweight + index, mask=inside, other=0.0), axis=0)
        start += merge.splits
    if merge.repeated:
        dbias = sums_of_lines(dbias, merged.width, units)
        dweight = sums_of_lines(dweight, merged.width, units) * rstd
        line, exists = unit, units_exist
    else:
        dweight *= at_lines(rstd, merged.width, units, merge.lines)
    tl.store(sums.dweight + line, dweight, mask=exists)
    tl.store(sums.dbias + line, dbias, mask=exists)
    if means.b is not None:
        if elements_ptr is not None:
            elements = tl.load(elements_ptr)
        scale = value(weight_ptr, line % merged.channels, exists, 1.0, rstd)
        scale *= rstd if merge.repeated else at_lines(rstd, merged.width, units, merge.lines)
        sum_wg, sum_wg_xhat = tl.where(exists, scale * dbias, 0.0), tl.where(exists, scale * dweight, 0.0)
        if not merge.repeated:
            sum_wg = sums_of_lines(sum_wg, merged.width, units)
            sum_wg_xhat = sums_of_lines(sum_wg_xhat, merged.width, units)
        found = gradient_means(sum_wg, sum_wg_xhat, rstd, tl.full(rstd.shape, elements, rstd.dtype))
        tl.store(means.b + unit, found.b, mask=units_exist)
        tl.store(means.w + unit, found.w, mask=units_exist)


@triton.jit
def gradient_apply(
    tensors: Backward,  # dy, or, with no activation, what ``gradient_sums`` wrote to dv
    dx_ptr,
    moments: Moments,
    affine: Affine,
    means: Means,  # of ``merge_gradient_sums``
    eps: tl.float64,
    view: View,
    splits,
    activation: tl.constexpr,
    tile: tl.constexpr,
):
    """dx: the second pass. Grid: (batches x splits x blocks of lines,)."""
    shape, block = shape_of(view, tile)
    place, split = split_place(shape, block, splits)
    values, unit, exists = split_values(moments, affine, eps, place, shape, tile)
    of_lines = Means(
        tl.load(means.b + unit, mask=exists, other=0.0), tl.load(means.w + unit, mask=exists, other=0.0)
    )
    input_gradient_tiles(tensors, dx_ptr, values, of_lines, place, split, splits, shape, activation, tile)
