"""Isotropic noise on the weights of a linear layer, separate for every example, added after a dense product.

    (W + sigma E) v = W v + sigma |v| eps         E, eps independent standard normals

This is exact in distribution (Kingma et al. 2015), so no noisy W is made:

    z[b, n]  = x[b, n] + deviation[b] eps[b, n]       y = f(z)       ``row_noise``
    dd[b]    = sum_n dz[b, n] eps[b, n]               dz = dy f'(z)  ``row_noise_backward``; dx is dz

f is an activation or the identity. With the identity dx is dy, and the backward pass writes only dd.

Cost. Forward reads x and writes y, 2 accesses; backward reads dy once. With an activation backward takes 3, because
f' reads y and dx is written. If the derivative does not follow from y (gelu and others), forward also writes z, 3
accesses, and backward reads z in place of y. With 4 normals a call of Philox, an element takes 28 (fp32) to 31
instructions (16 bits, where normals change threads to make 16-byte accesses) forward, and 23 to 25 backward. On an
H100 that is predicted to take less time than the bytes, except for the backward pass in 16 bits. Forward, a program
has 1,024 columns of a row; backward it has a whole row, because the order of its sum is fixed.
"""

import triton
import triton.language as tl

from . import activation
from .fastmath import bound, upcast
from .philox import row_normals

NOT_SPECIALIZED = ("seed_ptr", "seed", "offset")


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def row_noise(
    x_ptr,  # [rows, columns]
    deviation_ptr,  # fp32 [rows]
    y_ptr,  # [rows, columns]
    before_ptr,  # [rows, columns], receives the argument of the activation; or None
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    columns,
    blocks,  # of columns
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows times blocks of columns."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row = tl.program_id(0) // blocks + tl.arange(0, 1)
    first = (tl.program_id(0) % blocks) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column
    inside = column < columns
    x = upcast(tl.load(x_ptr + place, mask=inside, other=0.0))
    deviation = tl.load(deviation_ptr + row)[:, None]
    y = tl.fma(deviation + tl.zeros_like(x), row_normals(row, first, seed, offset, 0, 1, BLOCK), x)
    if before_ptr is not None:
        tl.store(before_ptr + place, y.to(before_ptr.dtype.element_ty), mask=inside)
    y = activation.forward(y, ACTIVATION, y_ptr.dtype.element_ty)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def row_noise_backward(
    dy_ptr,  # [rows, columns]
    kept_ptr,  # [rows, columns]: what the derivative of the activation needs; or None
    dx_ptr,  # [rows, columns], receives dy f'; or None, where it equals dy
    ddeviation_ptr,  # fp32 [rows], or None
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    columns,
    DERIVATIVE: tl.constexpr,  # of the activation, as a function of ``kept``
    BLOCK: tl.constexpr,
):
    """One program a row."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    row = tl.program_id(0) + tl.arange(0, 1)
    total = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, bound(columns), BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        place = row.to(tl.int64)[:, None] * columns + column
        inside = column < columns
        dx = upcast(tl.load(dy_ptr + place, mask=inside, other=0.0))
        if DERIVATIVE is not None:
            kept = upcast(tl.load(kept_ptr + place, mask=inside, other=0.0))
            dx = activation.backward(dx, kept, DERIVATIVE, kept_ptr.dtype.element_ty)
            tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if ddeviation_ptr is not None:
            total += dx * row_normals(row, first, seed, offset, 0, 1, BLOCK)
    if ddeviation_ptr is not None:
        tl.store(ddeviation_ptr + row, tl.sum(total, 1))
