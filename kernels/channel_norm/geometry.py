"""Where the elements of lines lie, and which of them a program takes.

A LINE is what one channel has in one set of statistics. A UNIT is ``width`` neighbouring lines that share statistics.

                    lines                    a line                       width
    batch norm      channels                 N x spatial positions        1
    instance norm   samples x channels       spatial positions            1
    group norm      samples x channels       spatial positions            channels of a group

Channels first, memory is [segments, lines, along]: a line is one run of ``along`` neighbours in each segment (a sample
of batch norm; group norm has one segment, as every sample has lines of its own). A tile is [lines, along]. Four tiles
a, b, c, d of 2 lines x 4, for a batch norm of 2 samples, 4 channels and 8 positions; a dot is one element:

                 segment 0                segment 1
               along 0 ... 7            along 0 ... 7
    line 0    a a a a b b b b          c c c c d d d d     <- neighbours in memory run this way
    line 1    a a a a b b b b          c c c c d d d d
    line 2    . . . . . . . .          . . . . . . . .
    line 3    . . . . . . . .          . . . . . . . .

    block     the lines of a program: here 0 and 1, or 2 and 3
    whole     one program takes a, b, c and d; with width 2, lines 0 and 1 are its unit
    split     in 2: one program takes a and c, another b and d, and their sums are merged

Channels last, memory is [batches, along, lines]: a line is a column (a batch is a sample of group norm; batch norm has
one). A tile is [along, lines], and its vectors run across lines. The same tiles:

               line 0   1   2   3
    along 0         a   a   .   .      <- neighbours in memory run this way
          1         a   a   .   .
          2         a   a   .   .
          3         a   a   .   .
          4         b   b   .   .
          ...

That is all the difference between the two orders: ``spread`` puts a value per line beside the tile, ``line_sum`` sums a
tile to one value per line, and everything else is written once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..fastmath import add, fma
from ..structs import of_constants


class View(NamedTuple):
    """A tensor as lines, as a kernel is given it: integers."""

    outer: tl.tensor  # lines; channels last, elements of a line
    inner_vectors: tl.tensor  # elements of a line in a segment, in vectors; channels last, lines
    segments: tl.tensor
    channels: tl.tensor
    width: tl.tensor  # lines of a unit
    block: tl.tensor  # lines of a program, whole units for a whole plan; channels last, in vectors


class Tile(NamedTuple):
    """How a program walks over its lines: constants."""

    lines: int  # a power of 2
    along: int
    vector: int  # elements of one access, at most 16 bytes, which divide the innermost dimension
    last: bool  # channels last
    segmented: bool  # there may be several segments
    even: bool  # no element of any tile lies outside the tensor
    repeated: bool  # all lines of a unit are one channel, as planes are in batch norm; else each is its own


class Shape(NamedTuple):
    """The view, in elements."""

    lines: tl.tensor  # of a batch
    along: tl.tensor  # elements of a line in a segment
    segments: tl.tensor
    channels: tl.tensor
    width: tl.tensor


class Place(NamedTuple):
    """The lines that a program takes."""

    batch: tl.tensor
    first_line: tl.tensor
    block: tl.tensor  # how many


class Lines(NamedTuple):
    """The lines of a program [lines]."""

    number: tl.tensor
    exist: tl.tensor


class Elements(NamedTuple):
    """The elements of a tile: addresses are lane + base."""

    lane: tl.tensor  # differs between threads, and is the same for every tile
    base: tl.tensor  # one number a tile
    inside: tl.tensor  # which of them are in the tensor
    along: tl.tensor  # how many a line has in this tile


@triton.constexpr_function
def full(tile, number, count):
    """``tile``, for the tile of that number, where the first ``count`` of a line are known to be full."""
    tile = of_constants(tile, Tile)
    return tile._replace(even=tile.even or number < count)


@triton.constexpr_function
def byte_tile(tile):
    """``tile`` in bytes of eight neighbouring elements."""
    tile = of_constants(tile, Tile)
    return tile._replace(lines=tile.lines // 8) if tile.last else tile._replace(along=tile.along // 8)


@triton.jit
def spread(v, tile: tl.constexpr):
    """A value per line [lines], to be broadcast over a tile."""
    return v[None, :] if tile.last else v[:, None]


@triton.jit
def line_sum(x, tile: tl.constexpr):
    return tl.sum(x, axis=0 if tile.last else 1)


@triton.jit
def zeros(dtype: tl.constexpr, tile: tl.constexpr):
    LINES: tl.constexpr = tile.lines
    ALONG: tl.constexpr = tile.along
    return tl.zeros([ALONG, LINES] if tile.last else [LINES, ALONG], dtype)


@triton.jit
def shape_of(view, tile: tl.constexpr):
    """The view in elements, and the lines of a program.

    The innermost size is a product, so that the compiler sees that a vector lies inside as a whole or not at all, and
    is aligned.
    """
    inner = view.inner_vectors * tile.vector
    if tile.last:
        return Shape(inner, view.outer, view.segments, view.channels, view.width), view.block * tile.vector
    else:
        return Shape(view.outer, inner, view.segments, view.channels, view.width), view.block


@triton.jit
def whole_place(block):
    """Of a program with whole units. Grid: (blocks of lines, batches), so without divisions."""
    return Place(tl.program_id(1), tl.program_id(0) * block, block)


@triton.jit
def split_place(shape, block, splits):
    """Of a program that shares its lines with others, and which split of them it is.

    Grid: (batches x splits x blocks of lines,).
    """
    blocks = tl.cdiv(shape.lines, block)
    rest = tl.program_id(0) // blocks
    first_line = (tl.program_id(0) - rest * blocks) * block
    batch = rest // splits
    return Place(batch, first_line, block), rest - batch * splits


@triton.jit
def part_of(place, number: tl.constexpr, parts: tl.constexpr, tile: tl.constexpr):
    """One of the parts, a tile wide, to which the lines of a program are dealt."""
    if parts == 1:
        return place
    else:
        return Place(place.batch, place.first_line + number * tile.lines, tile.lines)


@triton.jit
def lines_of(place, lines, LINES: tl.constexpr):
    line = tl.arange(0, LINES)
    return Lines(place.first_line + line, (line < place.block) & (place.first_line + line < lines))


@triton.jit
def elements_of(number, place, shape, tile: tl.constexpr):
    """The elements of the tile with this number."""
    if tile.segmented:
        in_segment = tl.cdiv(shape.along, tile.along)
        segment = number // in_segment
        start = (number - segment * in_segment) * tile.along
    else:
        segment = place.batch
        start = number * tile.along
    line = spread(tl.arange(0, tile.lines), tile)
    step = tl.arange(0, tile.along)[:, None] if tile.last else tl.arange(0, tile.along)[None, :]
    if tile.last:
        lane = step * shape.lines + line
        base = (segment.to(tl.int64) * shape.along + start) * shape.lines + place.first_line
    else:
        lane = line * shape.along + step
        base = (segment.to(tl.int64) * shape.lines + place.first_line) * shape.along + start
    if tile.even:
        inside = tl.full([1, 1], True, tl.int1)
    else:
        # One comparison a tile: the end of a line, 0 for a line that does not exist, is the same in all tiles.
        exists = (line < place.block) & (place.first_line + line < shape.lines)
        inside = start + step < exists.to(tl.int32) * shape.along
    return Elements(lane, base, inside, tl.minimum(shape.along - start, tile.along))


@triton.jit
def tiles_of(shape, tile: tl.constexpr):
    """How many tiles a line has."""
    in_segment = tl.cdiv(shape.along, tile.along)
    return shape.segments * in_segment if tile.segmented else in_segment


@triton.jit
def load(ptr, at):
    return tl.load(ptr + at.lane + at.base, mask=at.inside, other=0.0)


@triton.jit
def store(ptr, at, x):
    tl.store(ptr + at.lane + at.base, x.to(ptr.dtype.element_ty), mask=at.inside)


# --- sums of tiles ----------------------------------------------------------------------------------------
#
# Where a thread's vectors run along a line, each is summed at once: sums of tiles then take one register, not several.


@triton.constexpr_function
def summed_at_once(tile):
    """How many neighbours along a line are."""
    tile = of_constants(tile, Tile)
    return 1 if tile.last else tile.vector


@triton.jit
def vector_sums(x, vector: tl.constexpr):
    if vector == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // vector, vector]), axis=2)


@triton.jit
def plus(sums, x, vector: tl.constexpr):
    """Sums of tiles (``vector_sums``) with those of one more."""
    return add(sums, x) if vector == 1 else sums + vector_sums(x, vector)


@triton.jit
def plus_product(sums, a, b, vector: tl.constexpr):
    return fma(a, b, sums) if vector == 1 else sums + vector_sums(a * b, vector)
