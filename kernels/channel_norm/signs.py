"""One bit an element: whether it is positive.

The derivative of relu and leaky_relu needs no more of v = normalized x + residual than its sign. A bit an element,
written forward and read backward, takes the place of reading the residual again, which has 16 or 32 times as many.

Bit i % 8 of byte i // 8 is "element i of v is not <= 0" (so NaN, like positive numbers, lets the gradient through). The
bytes of a tile are a tile themselves, with an eighth of the elements in the direction in which memory runs.
"""

import triton
import triton.language as tl

from .geometry import Place, Shape, byte_tile, elements_of


@triton.jit
def _bytes_of(number, place, shape, tile: tl.constexpr):
    """The bytes of the tile with this number."""
    if tile.last:
        shape = Shape(shape.lines // 8, shape.along, shape.segments, shape.channels, shape.width)
        place = Place(place.batch, place.first_line // 8, place.block // 8)
    else:
        shape = Shape(shape.lines, shape.along // 8, shape.segments, shape.channels, shape.width)
    return elements_of(number, place, shape, byte_tile(tile))


@triton.jit
def store_signs(ptr, v, number, place, shape, tile: tl.constexpr):
    at = _bytes_of(number, place, shape, tile)
    bits = tl.reshape(tl.where(v <= 0, 0, 1), [v.shape[0], v.shape[1] // 8, 8])
    signs = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
    tl.store(ptr + at.lane + at.base, signs.to(tl.uint8), mask=at.inside)


@triton.jit
def load_signs(ptr, number, place, shape, like, tile: tl.constexpr):
    """1 where the bit is set and -1 elsewhere, shaped as ``like``: a stand-in for v, which had that sign."""
    at = _bytes_of(number, place, shape, tile)
    signs = tl.load(ptr + at.lane + at.base, mask=at.inside, other=0).to(tl.int32)
    bits = (signs[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, like.shape) != 0, 1.0, -1.0).to(like.dtype)
