"""What both plans do with a tile, once mean and variance are known.

forward     y = f(v),   v = (x - mean) scale + bias + residual,   scale = weight / sqrt(var + eps)

backward    g = f'(v) dy,   xhat = (x - mean) rstd,   and with sums over a unit of m elements

            dbias = sum g        dweight = sum g xhat        (of each line, then over the samples)
            dx = rstd (weight g - B - xhat W),   B = sum (weight g) / m,   W = sum (weight g xhat) / m
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import activation
from ..fastmath import add, difference, fma, mul, total, upcast
from .geometry import elements_of, load, spread, store, tiles_of, zeros
from .signs import load_signs, store_signs


class Forward(NamedTuple):
    """Pointers to tensors of x's shape: fp64, fp32, fp16 or bf16, dense, [segments, lines, along] or (channels last)
    [batches, along, lines]."""

    x: tl.tensor
    residual: tl.tensor  # or None
    y: tl.tensor
    signs: tl.tensor  # uint8 [elements / 8], or None: signs.py


class Backward(NamedTuple):
    """Pointers to tensors of x's shape, as above, that the backward pass reads."""

    dy: tl.tensor
    x: tl.tensor
    residual: tl.tensor  # where the activation needs it and there are no signs; else None
    signs: tl.tensor


class Gradients(NamedTuple):
    """Pointers to where the backward pass writes, laid out as x; or None."""

    dx: tl.tensor
    dv: tl.tensor  # the gradient of v, which is the residual's


class Sums(NamedTuple):
    """Pointers to values per line, or None."""

    dbias: tl.tensor
    dweight: tl.tensor


class Means(NamedTuple):
    """-rstd B and -rstd^2 W of the equations above: what dx needs of a unit."""

    b: tl.tensor
    w: tl.tensor


@triton.jit
def preactivation(d, values, residual_ptr, at, tile: tl.constexpr):
    """v, from d = x - mean."""
    v = fma(d, spread(values.scale, tile), spread(values.bias, tile))
    if residual_ptr is not None:
        v = total(load(residual_ptr, at), v)
    return v


# --- forward ----------------------------------------------------------------------------------------------


@triton.jit
def apply_tile(x, tensors, values, number, place, shape, activation_: tl.constexpr, tile: tl.constexpr):
    """Writes y and the signs. x: the tile, or None to load it."""
    at = elements_of(number, place, shape, tile)
    if x is None:
        x = load(tensors.x, at)
    d = difference(x, spread(values.mean, tile))
    v = preactivation(d, values, tensors.residual, at, tile)
    if tensors.signs is not None:
        store_signs(tensors.signs, v, number, place, shape, tile)
    store(tensors.y, at, activation.forward(v, activation_, x.dtype))


@triton.jit
def apply_tiles(tensors, values, place, split, splits, shape, activation_: tl.constexpr, tile: tl.constexpr):
    # The last tiles first: they were read last, and are the likeliest to be in a cache.
    number = tiles_of(shape, tile) - 1 - split
    while number >= 0:
        apply_tile(None, tensors, values, number, place, shape, activation_, tile)
        number -= splits


# --- backward ---------------------------------------------------------------------------------------------


@triton.jit
def gradient(x, dy, tensors, values, number, place, shape, activation_: tl.constexpr, tile: tl.constexpr):
    """g, x - mean, and where the tile lies. g is 0 outside the tensor. x, dy: the tiles, or None to load them."""
    at = elements_of(number, place, shape, tile)
    if x is None:
        x = load(tensors.x, at)
    d = difference(x, spread(values.mean, tile))
    if dy is None:
        dy = load(tensors.dy, at)
    g = upcast(dy).to(d.dtype)
    if activation_ is not None:
        if tensors.signs is not None:
            v = load_signs(tensors.signs, number, place, shape, d, tile)
        else:
            v = preactivation(d, values, tensors.residual, at, tile)
        g = activation.backward(g, v, activation_, x.dtype)
    return g, d, at


@triton.jit
def gradient_sums_of_tiles(
    tensors, outputs, values, place, split, splits, shape, activation_: tl.constexpr, tile: tl.constexpr
):
    """Sums of g and g (x - mean) over this program's tiles, as tiles. Writes dv, and scale g to dx, if wanted."""
    sums = zeros(values.mean.dtype, tile)
    products = tl.zeros_like(sums)
    number = split
    while number < tiles_of(shape, tile):
        g, d, at = gradient(None, None, tensors, values, number, place, shape, activation_, tile)
        if outputs.dv is not None:
            store(outputs.dv, at, g)
        if outputs.dx is not None:
            store(outputs.dx, at, mul(g, spread(values.scale, tile)))
        sums = add(sums, g)
        products = fma(g, d, products)
        number += splits
    return sums, products


@triton.jit
def gradient_means(sum_wg, sum_wg_xhat, rstd, elements):
    """From sums of scale g and scale g xhat over a unit."""
    return Means(-sum_wg / elements, -rstd * sum_wg_xhat / elements)


@triton.jit
def input_gradient(g, d, values, means, tile: tl.constexpr):
    """dx = scale g - rstd B - d rstd^2 W, from d = x - mean."""
    return fma(g, spread(values.scale, tile), fma(d, spread(means.w, tile), spread(means.b, tile)))


@triton.jit
def input_gradient_tiles(
    tensors, dx_ptr, values, means, place, split, splits, shape, activation_: tl.constexpr, tile: tl.constexpr
):
    number = tiles_of(shape, tile) - 1 - split  # the last first, as in ``apply_tiles``
    while number >= 0:
        g, d, at = gradient(None, None, tensors, values, number, place, shape, activation_, tile)
        store(dx_ptr, at, input_gradient(g, d, values, means, tile))
        number -= splits
