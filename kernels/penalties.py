"""Penalties on the weights, their gradients, and projections into a ball: many tensors in one launch.

    value       sum over all p of  l1 |p - mean| + l2 / 2 (p - mean)^2
    gradient    gain (l1 sign(p - mean) + l2 (p - mean)),  written, or added to what is there
    projection  p min(1, radius / |p|)  of each row, or of each tensor

L1, L2, the elastic net (Zou and Hastie 2005) and the negative logarithms of Gaussian and Laplace priors are one value
with other numbers. The subgradient at the kink of L1 is 0, as in torch.

Cost, bytes a weight of fp32. Through autograd: forward reads p, 4; backward reads p and writes the gradient, 8: 12 in
all, and nothing but p is saved. To write the unit gradient in the forward pass would move 8 there, hold as much memory
as the model until the backward pass, and move 8 more in it to multiply by the gradient of the loss: 16. What autograd
does then, adding this gradient to that of the loss, moves another 12. So there is a third way, which adds in the pass
that computes the value: read p and g, write g, 12 in place of 24.
Projection: a row that fits a tile is read once, 4, and written where it lies outside, 4 more. Longer ones are summed
tile by tile (4), and what lies outside is read and written in a second launch (8); what lies inside is not touched.

A program takes one tile of one tensor. Its sum is one fp64 number in memory, which ATen's sum (of a fixed order) or
``optimizers.fold`` adds up: no atomics. Arithmetic (sm_90) is 9 to 21 instructions a weight, where the memory of an
H100 (3 TB/s) leaves time for 36 at 4 bytes and for 108 at 12. A tail, or a tile that 16-byte accesses do not reach, is
done in a loop over pieces of one element a thread.

The plain twin is plain/penalties.py, with a launch for each tensor; here one takes all of a model, by a table of
addresses, and adds to a gradient that is there already: two accesses less than a gradient that is added afterwards.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .fastmath import bound
from .multi_tensor import aligned, chunk, elements, entry, read, write
from .ptxas import terms

# The rows of the table of entries: an address, a number, and then what the kernel has in third place.
PARAMETER = tl.constexpr(0)
NUMEL = tl.constexpr(1)
GRADIENT = tl.constexpr(2)  # of ``penalize``: an address
ROW = tl.constexpr(2)  # of the projections: how many elements a norm goes over


class Plan(NamedTuple):
    """What ``penalize`` is compiled for."""

    l1: bool  # not 0
    l2: bool
    centred: bool  # mean is not 0
    how: str  # the gradient: "none", "write" or "add"
    rows: bool  # a tile ends with its row
    parameter: Any  # dtypes of weights and gradients
    gradient: Any
    compute: Any  # fp32, or fp64
    block: int
    vector: int  # elements of the narrowest of these types in 16 bytes


class Strengths(NamedTuple):
    """0.5 l2 (x - mean)^2 + l1 |x - mean|, and what its gradient is multiplied with."""

    l1: tl.tensor
    l2: tl.tensor
    mean: tl.tensor
    gain: tl.tensor


@triton.jit
def _penalty_tile(
    entries_ptr, tensors, tensor, first, limit, strengths, VALUE: tl.constexpr,
    plan: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one tile and returns its value, either if wanted."""
    P: tl.constexpr = plan.parameter
    G: tl.constexpr = plan.gradient
    l1, l2 = strengths.l1, strengths.l2
    element = elements(first, BLOCK, plan.vector, ALIGNED)
    mask = None if ALIGNED else element < limit
    x = read(entry(entries_ptr, tensors, tensor, PARAMETER), element, mask, P, ALIGNED)
    if plan.centred:
        x -= strengths.mean
    if plan.how != "none":
        g_address = entry(entries_ptr, tensors, tensor, GRADIENT)
        slope = tl.zeros_like(x)
        if plan.l2:
            slope = l2 * x
        if plan.l1:
            slope += tl.where(x > 0, l1, tl.where(x < 0, -l1, 0.0))
        slope *= strengths.gain
        if plan.how == "add":
            slope += read(g_address, element, mask, G, ALIGNED)
        write(g_address, element, slope, mask, G, ALIGNED)
    value = tl.zeros([], x.dtype)
    if VALUE:
        if mask is not None:
            x = tl.where(mask, x, 0.0)
        if plan.l2:
            value = 0.5 * l2 * tl.sum(terms(x, x, 0), 0)
        if plan.l1:
            value += l1 * tl.sum(tl.abs(x), 0)
    return value


@triton.jit(do_not_specialize=["tensors", "programs"])
def penalize(
    entries_ptr,  # int64 [3, tensors]
    chunks_ptr,  # int64 [2, programs]
    partials_ptr,  # fp64 [programs]: the value of each tile, or None
    gain_ptr,  # fp64 or fp32 [1]: what the gradient is multiplied with, or None for 1
    l1: tl.float64,
    l2: tl.float64,
    mean: tl.float64,
    tensors,
    programs,
    plan: tl.constexpr,
):
    """Value, gradient or both. Grid: (programs,)."""
    COMPUTE: tl.constexpr = plan.compute
    BLOCK: tl.constexpr = plan.block
    VALUE: tl.constexpr = partials_ptr is not None
    tensor, first = chunk(chunks_ptr, programs)
    limit = entry(entries_ptr, tensors, tensor, NUMEL)
    if plan.rows:
        length = entry(entries_ptr, tensors, tensor, ROW)
        limit = first - first % length + length
    addresses = entry(entries_ptr, tensors, tensor, PARAMETER)
    if plan.how != "none":
        addresses |= entry(entries_ptr, tensors, tensor, GRADIENT)
    gain = tl.full([], 1.0, COMPUTE) if gain_ptr is None else tl.load(gain_ptr).to(COMPUTE)
    # Numbers came as fp64.
    strengths = Strengths(
        tl.full([], l1, COMPUTE), tl.full([], l2, COMPUTE), tl.full([], mean, COMPUTE), gain
    )
    if aligned(addresses) & (first % plan.vector == 0) & (first + BLOCK <= limit):
        value = _penalty_tile(
            entries_ptr, tensors, tensor, first, limit, strengths, VALUE, plan, BLOCK, True,
        )  # fmt: skip
        if VALUE:
            tl.store(partials_ptr + tl.program_id(0), value.to(tl.float64))
    else:
        PIECE: tl.constexpr = BLOCK // 16
        value = tl.zeros([], COMPUTE)
        count = tl.minimum(first + BLOCK, limit) - first
        for start in range(0, bound(count.to(tl.int32)), PIECE):
            value += _penalty_tile(
                entries_ptr, tensors, tensor, first + start, limit, strengths, VALUE, plan, PIECE, False,
            )  # fmt: skip
        if VALUE:
            tl.store(partials_ptr + tl.program_id(0), value.to(tl.float64))


@triton.jit
def _rows_tile(
    address, first, length, limit, radius,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows of ``length`` elements, from ``first`` on and below ``limit``."""
    # As products, see ``elements``. (A row ends with a vector, so the last one does.)
    STEP: tl.constexpr = VECTOR if ALIGNED else 1
    length = length // STEP * STEP
    first = first // STEP * STEP
    start = first + tl.arange(0, BLOCK // WIDTH).to(tl.int64)[:, None] * length
    column = tl.arange(0, WIDTH)[None, :]
    # One comparison an element: nothing is left behind the last row.
    left = (tl.minimum(length, limit - start) // STEP).to(tl.int32) * STEP
    mask = column < left
    x = read(address, start + column, mask, P, ALIGNED, 0.0)
    norm = tl.sqrt(tl.sum(terms(x, x, 1, STEP), 1))
    outside = norm > radius  # a NaN is not
    x *= (radius / tl.where(outside, norm, 1.0))[:, None]
    write(address, start + column, x, mask & outside[:, None], P, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "programs"])
def project_rows(
    entries_ptr,  # int64 [3, tensors]
    chunks_ptr,  # int64 [2, programs]
    radius: tl.float64,
    tensors,
    programs,
    P: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of 2 that a row fits into
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Projects BLOCK / WIDTH rows. Grid: (programs,)."""
    tensor, first = chunk(chunks_ptr, programs)
    address = entry(entries_ptr, tensors, tensor, PARAMETER)
    limit = entry(entries_ptr, tensors, tensor, NUMEL)
    length = entry(entries_ptr, tensors, tensor, ROW)
    radius = tl.full([], radius, COMPUTE)  # it came as fp64
    if aligned(address) & (first % VECTOR == 0) & (length % VECTOR == 0):
        _rows_tile(address, first, length, limit, radius, P, WIDTH, BLOCK, VECTOR, True)
    else:
        # As many rows in a turn as have one element a thread, if there are rows so short.
        PIECE: tl.constexpr = WIDTH if BLOCK // 16 < WIDTH else BLOCK // 16
        elements = tl.minimum(BLOCK // WIDTH * length, limit - first).to(tl.int32)
        rows = elements // length.to(tl.int32)
        for start in range(0, bound(rows), PIECE // WIDTH):
            _rows_tile(address, first + start * length, length, limit, radius, P, WIDTH, PIECE, VECTOR, False)


@triton.jit
def _scaled_tile(
    address, first, limit, scale,
    P: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    element = elements(first, BLOCK, VECTOR, ALIGNED)
    mask = None if ALIGNED else element < limit
    x = read(address, element, mask, P, ALIGNED)
    write(address, element, x * scale, mask, P, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "programs"])
def shorten(
    entries_ptr,  # int64 [3, tensors]
    chunks_ptr,  # int64 [2, programs]
    chunk_units_ptr,  # int64 [programs]: which row a tile is of
    squared_ptr,  # fp64 [rows]: sums of squares
    radius: tl.float64,
    tensors,
    programs,
    P: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The second half of a projection of long rows: those outside of the ball. Grid: (programs,)."""
    norm = tl.sqrt(tl.load(squared_ptr + tl.load(chunk_units_ptr + tl.program_id(0))))
    if norm > radius:
        scale = (radius / norm).to(COMPUTE)
        tensor, first = chunk(chunks_ptr, programs)
        address = entry(entries_ptr, tensors, tensor, PARAMETER)
        length = entry(entries_ptr, tensors, tensor, ROW)
        limit = first - first % length + length
        if aligned(address) & (first % VECTOR == 0) & (first + BLOCK <= limit):
            _scaled_tile(address, first, limit, scale, P, BLOCK, VECTOR, True)
        else:
            PIECE: tl.constexpr = BLOCK // 16
            count = tl.minimum(first + BLOCK, limit) - first
            for start in range(0, bound(count.to(tl.int32)), PIECE):
                _scaled_tile(address, first + start, limit, scale, P, PIECE, VECTOR, False)
