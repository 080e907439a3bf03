"""Gaussian noise on a tensor, in one pass, with a standard normal eps for each element:

    y = x + std eps        additive: noise on inputs is Tikhonov regularization (Bishop 1995)
    y = x (1 + std eps)    multiplicative: Gaussian dropout (Srivastava et al. 2014, section 10)

The noise is never stored. The gradient of the additive form is dy itself, which takes no kernel; that of the
multiplicative form is dy (1 + std eps): this kernel once more, with the same noise drawn again.

Cost, e bytes an element: x is read and y written, 2e, the floor. Arithmetic (sm_90): 22 instructions an element of
16 bits, 20 of fp32, one more where multiplicative. Philox takes 10 of them, at four normals a call, and Box and
Muller 6.5, two of them special functions. The memory of an H100 (3 TB/s) leaves time for 38 instructions a 16-bit
element and for 76 in fp32, so that memory is the bound. A B200 (7 TB/s) leaves 20 and 40: there the arithmetic of
16-bit elements takes a tenth longer than their memory. ``fastreg inspect`` counts them.

Accesses are 16 bytes wide, and the normals are born in the thread that loads their elements: one group of four
for a vector of fp32, two for one of 16 bits. No shuffle, no shared memory (fp64 alone takes some).

The plain twin is plain/noise.py. What this one does otherwise: accesses of 16 bytes, and four normals of each call of
Philox, where the plain one makes a call for every element.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .fastmath import upcast
from .philox import normals
from .structs import of_constants


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    multiplicative: bool
    ragged: bool  # there are elements behind the last whole vector
    block: int
    vector: int  # 8 for 16-bit types, else 4
    wide: bool  # 64-bit indices, for 2^31 elements and more


@triton.constexpr_function
def _tail_of(plan):
    plan = of_constants(plan, Plan)
    return plan._replace(block=plan.vector)


@triton.jit
def _normals(first, seed, offset, plan: tl.constexpr):
    """fp32 [block]: the normals of the elements from ``first``, a multiple of the vector, on."""
    BLOCK: tl.constexpr = plan.block
    VECTOR: tl.constexpr = plan.vector
    vector = first // VECTOR + tl.arange(0, BLOCK // VECTOR)
    if VECTOR == 4:
        return tl.reshape(normals(vector, seed, offset), [BLOCK])
    else:
        halves = tl.join(normals(2 * vector, seed, offset), normals(2 * vector + 1, seed, offset))
        return tl.reshape(tl.permute(halves, (0, 3, 1, 2)), [BLOCK])


@triton.jit
def _tile(x_ptr, y_ptr, seed, offset, std, first, limit, plan: tl.constexpr):
    element = first + tl.arange(0, plan.block)
    inside = element < limit
    x = upcast(tl.load(x_ptr + element, mask=inside, other=0.0))
    eps = _normals(first, seed, offset, plan).to(x.dtype)
    std = tl.full([1], std, x.dtype)  # it came as fp64
    y = x * tl.fma(eps, std, tl.full([1], 1.0, x.dtype)) if plan.multiplicative else tl.fma(eps, std, x)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=inside)


# Numbers that change from call to call: a kernel of its own for those that divide by 16 would gain nothing.
@triton.jit(do_not_specialize=("seed_ptr", "seed", "offset", "vectors", "tail"))
def add_noise(
    x_ptr,  # fp64, fp32, fp16 or bf16 [elements]: a dense tensor in memory order
    y_ptr,  # the same dtype [elements]; may be x_ptr
    seed_ptr,  # int64 [1], or None where the seed comes as a number
    seed: tl.int64,
    offset: tl.int64,
    std: tl.float64,
    vectors,  # whole ones
    tail,  # elements behind the last whole vector
    plan: tl.constexpr,
):
    """One tile a program; grid: (blocks of whole vectors, one at least,)."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    first = (tl.program_id(0).to(tl.int64) if plan.wide else tl.program_id(0)) * plan.block
    # Written as a product, so that the compiler sees that a vector is inside as a whole or not at all.
    whole = (vectors.to(tl.int64) if plan.wide else vectors) * plan.vector
    _tile(x_ptr, y_ptr, seed, offset, std, first, whole, plan)
    if plan.ragged and tl.program_id(0) == 0:
        _tile(x_ptr, y_ptr, seed, offset, std, whole, whole + tail, _tail_of(plan))
