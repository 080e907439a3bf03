"""The plan for whole units: one program takes units as a whole, in one launch.

                 device memory, in accesses of a tensor of x's size (forward / backward)     2 / 3

A unit that fits stays in registers: a program loads all tiles of its lines, PARTS x TILES of them, and keeps them as
they are stored, so that 16-bit elements take half a register. Units that do not fit are read twice, in loops, the
second time from the L2 cache.

The lines of a unit are one tile; channels first, several PARTS where no power of 2 is near:

    a group of 10 channels                 part 0:  lines 0 1      each part is a tile of 2 lines, and no line of any
    in tiles of 2 lines x ALONG            ...                     is masked. As one tile of 16 lines, 6 would be.
                                           part 4:  lines 8 9

Backward, registers hold x and g; or, where that is too much (``reread``), g alone, and x is read again from the L2
cache: the first time a part at a time, so that the loads of the next part run while this one is summed.
Only the last tile of a line needs masks (``full``).

Registers are the limit. Three helpers of ptxas.py keep the compiler from holding values between the two passes, for
which there is no room: ``opaque``, ``pack_16bit`` and ``force_evaluated``.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..fastmath import difference, upcast
from ..ptxas import force_evaluated, opaque, pack_16bit, unknown_one
from .elementwise import (
    Backward,
    Forward,
    Gradients,
    Means,
    Sums,
    apply_tile,
    apply_tiles,
    gradient,
    gradient_means,
    gradient_sums_of_tiles,
    input_gradient,
    input_gradient_tiles,
)
from .geometry import (
    Place,
    View,
    elements_of,
    full,
    line_sum,
    lines_of,
    load,
    part_of,
    plus,
    plus_product,
    shape_of,
    spread,
    store,
    summed_at_once,
    vector_sums,
    whole_place,
    zeros,
)
from .moments import Running, kept_moments, line_moments, merged_lines, merged_parts, update_running
from .units import (
    Affine,
    Moments,
    Values,
    at_lines,
    channels_of,
    line_values,
    load_moments,
    rstd_of,
    sums_of_lines,
    sums_of_tile,
    unit_values,
    units_of,
    value,
)


class Plan(NamedTuple):
    """How a program keeps its lines: constants."""

    tiles: int  # of a line, all in registers; 0: they are read twice, in loops
    parts: int  # tiles to which the lines of one unit are dealt
    full: int  # so many tiles of a line are known to be full
    reread: bool = False  # backward: registers have no room but for g, and x is read twice


@triton.jit
def _load_tiles(ptr, place, shape, tile: tl.constexpr, plan: tl.constexpr):
    """All tiles of a part, as they are stored."""
    TILES: tl.constexpr = plan.tiles
    tiles = ()
    for number in tl.static_range(TILES):
        at = elements_of(number, place, shape, full(tile, number, plan.full))
        tiles = tiles + (load(ptr, at),)  # noqa: RUF005
    return tiles


@triton.jit
def whole_forward(
    tensors: Forward,
    moments: Moments,  # written
    affine: Affine,
    running: Running,  # updated
    momentum: tl.float64,
    eps: tl.float64,
    view: View,
    activation: tl.constexpr,
    tile: tl.constexpr,
    units: tl.constexpr,
    plan: tl.constexpr,
):
    """y and the moments of x. Grid: (blocks of lines, batches)."""
    TILES: tl.constexpr = plan.tiles
    PARTS: tl.constexpr = plan.parts
    shape, block = shape_of(view, tile)
    place = whole_place(block)
    unit, exists = units_of(place, shape.lines, shape.width, units, tile.lines)
    if TILES:
        kept = ()
        for part in tl.static_range(PARTS):
            of_part = part_of(place, part, PARTS, tile)
            kept = kept + (_load_tiles(tensors.x, of_part, shape, tile, plan),)  # noqa: RUF005
        mean, var, count = kept_moments(kept, place, shape, tile, units, plan)
    else:
        means, variances = (), ()
        for part in tl.static_range(PARTS):
            of_part = part_of(place, part, PARTS, tile)
            mean, var, count = line_moments(tensors.x, of_part, 0, unknown_one(), shape, tile)
            means, variances = means + (mean,), variances + (var,)  # noqa: RUF005
        mean, var = merged_parts(means, variances, PARTS)
        lines_exist = lines_of(part_of(place, 0, PARTS, tile), shape.lines, tile.lines).exist
        mean, var = merged_lines(mean, var, lines_exist, shape.width // PARTS, units)
    tl.store(moments.mean + unit, mean, mask=exists)
    tl.store(moments.var + unit, var, mask=exists)
    update_running(running, momentum, unit, exists, mean, var, count * shape.width)
    of_units = unit_values(mean, rstd_of(var, eps), affine, unit, exists, tile)
    for part in tl.static_range(PARTS):
        of_part = part_of(place, part, PARTS, tile)
        values = line_values(of_units, affine, of_part, shape, tile, units)
        if TILES:
            for number in tl.static_range(TILES):
                apply_tile(
                    kept[part][number], tensors, values, number, of_part, shape, activation,
                    full(tile, number, plan.full),
                )  # fmt: skip
        else:
            apply_tiles(tensors, values, of_part, 0, unknown_one(), shape, activation, tile)


@triton.jit
def _kept_gradient_sums(
    x,
    dy,
    tensors,
    dv_ptr,
    values,
    place,
    shape,
    activation: tl.constexpr,
    tile: tl.constexpr,
    plan: tl.constexpr,
):
    """Sums of g and g (x - mean) over a part, as tiles; and its tiles of g, in the dtype of dy.

    x, dy: the tiles, or None where registers have room for one of each.
    """
    TILES: tl.constexpr = plan.tiles
    VECTOR: tl.constexpr = summed_at_once(tile)
    sums = vector_sums(zeros(values.mean.dtype, tile), VECTOR)
    products = tl.zeros_like(sums)
    like = tl.zeros([1], tensors.dy.dtype.element_ty)
    kept = ()
    for number in tl.static_range(TILES):
        g, d, at = gradient(
            None if x is None else x[number], None if dy is None else dy[number], tensors, values,
            number, place, shape, activation, full(tile, number, plan.full),
        )  # fmt: skip
        if dv_ptr is not None:
            store(dv_ptr, at, g)
        sums = plus(sums, g, VECTOR)
        products = plus_product(products, g, d, VECTOR)
        g = dy[number] if activation is None else pack_16bit(g, like, shape.along)
        kept = kept + (g,)  # noqa: RUF005
        if dy is None:
            products = force_evaluated(products, shape.along)
            sums = force_evaluated(sums, shape.along)
    return kept, sums, products


@triton.jit
def whole_backward(
    tensors: Backward,
    gradients: Gradients,
    sums: Sums,  # any float dtype [batches x lines]; ``tile.repeated``: [units]
    moments: Moments,
    affine: Affine,
    elements: tl.float64,  # of a unit
    eps: tl.float64,
    view: View,
    activation: tl.constexpr,
    tile: tl.constexpr,
    units: tl.constexpr,
    plan: tl.constexpr,
):
    """All gradients. Grid: (blocks of lines, batches)."""
    TILES: tl.constexpr = plan.tiles
    PARTS: tl.constexpr = plan.parts
    shape, block = shape_of(view, tile)
    place = whole_place(block)
    unit, exists = units_of(place, shape.lines, shape.width, units, tile.lines)
    mean, rstd = load_moments(moments, eps, unit, exists)
    of_units = unit_values(mean, rstd, affine, unit, exists, tile)

    # What is loaded ahead: of each part, its tiles. Several units leave no room for that if g has an activation.
    AHEAD: tl.constexpr = not (plan.reread and units.slots > 1 and activation is not None)
    dy, x, g = (), (), ()
    for part in tl.static_range(PARTS if TILES and AHEAD else 0):
        of_part = part_of(place, part, PARTS, tile)
        dy = dy + (_load_tiles(tensors.dy, of_part, shape, tile, plan),)  # noqa: RUF005
        if part == 0 or not plan.reread:
            x = x + (_load_tiles(tensors.x, of_part, shape, tile, plan),)  # noqa: RUF005

    # First pass: g, and its sums over lines and units.
    sum_wg = tl.zeros_like(mean)
    sum_wg_xhat = tl.zeros_like(mean)
    for part in tl.static_range(PARTS):
        of_part = part_of(place, part, PARTS, tile)
        values = line_values(of_units, affine, of_part, shape, tile, units)
        if TILES:
            if plan.reread and part + 1 < PARTS:  # on its way while this part is summed
                next_part = part_of(place, part + 1, PARTS, tile)
                x = x + (_load_tiles(tensors.x, next_part, shape, tile, plan),)  # noqa: RUF005
            kept, g_sums, g_products = _kept_gradient_sums(
                x[part] if AHEAD else None, dy[part] if AHEAD else None,
                tensors, gradients.dv, values, of_part, shape, activation, tile, plan,
            )  # fmt: skip
            g = g + (kept,)  # noqa: RUF005
        else:
            g_sums, g_products = gradient_sums_of_tiles(
                tensors,
                Gradients(None, gradients.dv),
                values,
                of_part,
                0,
                unknown_one(),
                shape,
                activation,
                tile,
            )
        if tile.repeated:
            dbias = sums_of_tile(g_sums, shape.width, tile, units)
            dweight = sums_of_tile(g_products, shape.width, tile, units) * rstd
            scale = of_units.scale
            index, there = unit, exists
        else:
            line_rstd = at_lines(rstd, shape.width, units, tile.lines)
            dbias = line_sum(g_sums, tile)
            dweight = line_sum(g_products, tile) * line_rstd
            # The weight is read once more, as there is no register to keep the scale in on all targets.
            channel, there = channels_of(of_part, shape, tile, units)
            scale = value(affine.weight, channel, there, 1.0, mean) * line_rstd
            index = of_part.batch * shape.lines + of_part.first_line + tl.arange(0, tile.lines)
        tl.store(sums.dweight + index, dweight, mask=there)
        tl.store(sums.dbias + index, dbias, mask=there)
        dbias = tl.where(there, scale * dbias, 0.0)
        dweight = tl.where(there, scale * dweight, 0.0)
        if tile.repeated:
            sum_wg, sum_wg_xhat = dbias, dweight
        else:
            sum_wg += sums_of_lines(dbias, shape.width, units)
            sum_wg_xhat += sums_of_lines(dweight, shape.width, units)

    # Second pass: dx.
    of_unit = gradient_means(sum_wg, sum_wg_xhat, rstd, tl.full([1], elements, mean.dtype))
    means = Means(
        at_lines(of_unit.b, shape.width, units, tile.lines),
        at_lines(of_unit.w, shape.width, units, tile.lines),
    )
    # What was computed from these would otherwise stay in registers until it is needed again.
    if plan.reread:
        place = Place(opaque(place.batch), place.first_line, place.block)
    else:
        of_units = Values(opaque(mean), of_units.scale, of_units.bias)
    for part in tl.static_range(PARTS):
        of_part = part_of(place, part, PARTS, tile)
        values = line_values(of_units, affine, of_part, shape, tile, units)
        if TILES:
            again = _load_tiles(tensors.x, of_part, shape, tile, plan) if plan.reread else x[part]
            for number in tl.static_range(TILES):
                at = elements_of(number, of_part, shape, full(tile, number, plan.full))
                d = difference(opaque(again[number]), spread(values.mean, tile))
                dx = input_gradient(upcast(g[part][number]).to(d.dtype), d, values, means, tile)
                store(gradients.dx, at, dx)
        else:
            input_gradient_tiles(
                tensors, gradients.dx, values, means, of_part, 0, unknown_one(), shape, activation, tile
            )
