"""The mean of an activation of normal variables: the inference of DropConnect (Wan et al. 2013).

    y[i]    = sum_d w[d] f(v)                 v = mean[i] + deviation[i] eps[i, d]
    dmean   = dy[i] sum_d w[d] f'(v)          ddeviation = dy[i] sum_d w[d] f'(v) eps[i, d]

By nodes (``integrate``): the trapezoidal rule, whose eps[d] and w[d] are the same for all elements, and in the code.
By draws (``average``), as in the paper: w[d] is 1/Z, and every element has normal numbers eps[i, d] of its own: value
d % 4 of Philox block i under an offset whose upper half is increased by d // 4, the normals of a tensor [elements, 4]
with a stream of its own for every four draws (``fastreg.random.draws``). None is stored.

Cost: mean, deviation and y once, however many terms there are. A term is the activation and one FMA before and behind
it; a draw also takes 20 instructions for its number, 13 for Philox at four normals a call and 7 for Box and Muller: 27
(sigmoid) to 35 (tanh) all together (sm_90). The bound are the special functions, two a normal and two for the
activation, 8 issue slots each; with tanh as much the issue. So a thread has one element, whose narrow accesses do not
count, and a small layer still fills the GPU; four would take 5 instructions of a draw less, and as long.
The sum is fp32, in the order of the terms.
"""

import math

import triton
import triton.language as tl

from . import activation
from .fastmath import bound, upcast
from .philox import box_muller, philox

NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "quads")


def _nodes(count: int, reach: float) -> tuple[tuple[float, float], ...]:
    """The positive half of ``count`` evenly spaced standard normal values up to ``reach``, and their weights."""
    values = [(2 * i + 1) * reach / (count - 1) for i in range(count // 2)]
    total = 2 * sum(math.exp(-0.5 * value**2) for value in values)
    return tuple((value, math.exp(-0.5 * value**2) / total) for value in values)


NODES = _nodes(48, 5.5)
FOUR_DRAWS = tl.constexpr(1 << 32)  # further on: the next offset


@triton.jit
def _four(element, seed, offset):
    """Four draws of each element: four tensors of standard normals."""
    r0, r1, r2, r3 = philox(element, seed, offset)
    e0, e1 = box_muller(r0, r1)
    e2, e3 = box_muller(r2, r3)
    return e0, e1, e2, e3


@triton.jit
def _tile(mean_ptr, deviation_ptr, elements, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    block = tl.program_id(0)
    element = (block.to(tl.int64) if WIDE else block) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    mean = upcast(tl.load(mean_ptr + element, mask=inside, other=0.0))
    deviation = upcast(tl.load(deviation_ptr + element, mask=inside, other=0.0))
    return element, inside, mean, deviation


@triton.jit
def _values(mean, deviation, e, NAME: tl.constexpr, STORED: tl.constexpr):
    return activation.forward(tl.fma(deviation, e + tl.zeros_like(mean), mean), NAME, STORED)


@triton.jit
def _slopes(mean, deviation, e, NAME: tl.constexpr, STORED: tl.constexpr):
    one = tl.full(mean.shape, 1.0, tl.float32)
    return activation.backward(one, tl.fma(deviation, e + tl.zeros_like(mean), mean), NAME, STORED)


@triton.jit
def integrate(
    mean_ptr,  # fp32, fp16 or bf16 [elements]
    deviation_ptr,  # any of those [elements]
    y_ptr,  # any of those [elements]
    elements,
    NODES: tl.constexpr,  # ((eps, weight), ...): the positive half
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit indices, for 2^31 elements and more
):
    """One block of elements a program; grid: (blocks,)."""
    STORED: tl.constexpr = y_ptr.dtype.element_ty
    element, inside, mean, deviation = _tile(mean_ptr, deviation_ptr, elements, BLOCK, WIDE)
    total = tl.zeros([BLOCK], tl.float32)
    for node in tl.static_range(len(NODES)):
        right = _values(mean, deviation, NODES[node][0], ACTIVATION, STORED)
        left = _values(mean, -deviation, NODES[node][0], ACTIVATION, STORED)
        total += (left + right) * NODES[node][1]
    tl.store(y_ptr + element, total.to(STORED), mask=inside)


@triton.jit
def integrate_backward(
    dy_ptr,  # fp32, fp16 or bf16 [elements]
    mean_ptr,
    deviation_ptr,
    dmean_ptr,  # as mean
    ddeviation_ptr,  # as deviation
    elements,
    NODES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Arguments and grid as in ``integrate``."""
    STORED: tl.constexpr = dy_ptr.dtype.element_ty
    element, inside, mean, deviation = _tile(mean_ptr, deviation_ptr, elements, BLOCK, WIDE)
    by_mean = tl.zeros([BLOCK], tl.float32)
    by_deviation = tl.zeros([BLOCK], tl.float32)
    for node in tl.static_range(len(NODES)):
        right = _slopes(mean, deviation, NODES[node][0], ACTIVATION, STORED)
        left = _slopes(mean, -deviation, NODES[node][0], ACTIVATION, STORED)
        by_mean += (left + right) * NODES[node][1]
        by_deviation += (right - left) * (NODES[node][0] * NODES[node][1])
    dy = upcast(tl.load(dy_ptr + element, mask=inside, other=0.0))
    tl.store(dmean_ptr + element, (dy * by_mean).to(dmean_ptr.dtype.element_ty), mask=inside)
    tl.store(ddeviation_ptr + element, (dy * by_deviation).to(ddeviation_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def average(
    mean_ptr,  # fp32, fp16 or bf16 [elements]
    deviation_ptr,  # any of those [elements]
    y_ptr,  # any of those [elements]
    seed_ptr,  # int64 [1], or None where the seed comes as a number
    seed: tl.int64,
    offset: tl.int64,
    elements,
    quads,  # whole fours of draws
    TAIL: tl.constexpr,  # draws behind them
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit indices, for 2^31 elements and more
):
    """One block of elements a program; grid: (blocks,)."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    offset = offset.to(tl.int64)  # where it is interpreted, a small number is of 32 bits
    STORED: tl.constexpr = y_ptr.dtype.element_ty
    element, inside, mean, deviation = _tile(mean_ptr, deviation_ptr, elements, BLOCK, WIDE)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(bound(quads)):
        e0, e1, e2, e3 = _four(element, seed, offset)
        a = _values(mean, deviation, e0, ACTIVATION, STORED) + _values(
            mean, deviation, e1, ACTIVATION, STORED
        )
        b = _values(mean, deviation, e2, ACTIVATION, STORED) + _values(
            mean, deviation, e3, ACTIVATION, STORED
        )
        total += a + b
        offset += FOUR_DRAWS
    if TAIL > 0:
        e0, e1, e2, _ = _four(element, seed, offset)
        total += _values(mean, deviation, e0, ACTIVATION, STORED)
        if TAIL > 1:
            total += _values(mean, deviation, e1, ACTIVATION, STORED)
        if TAIL > 2:
            total += _values(mean, deviation, e2, ACTIVATION, STORED)
    samples = (quads * 4 + TAIL).to(tl.float32)
    tl.store(y_ptr + element, (total / samples).to(STORED), mask=inside)


@triton.jit
def _plus_slopes(sums, mean, deviation, e, NAME: tl.constexpr, STORED: tl.constexpr):
    slope = _slopes(mean, deviation, e, NAME, STORED)
    return sums[0] + slope, tl.fma(slope, e, sums[1])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def average_backward(
    dy_ptr,  # fp32, fp16 or bf16 [elements]
    mean_ptr,
    deviation_ptr,
    dmean_ptr,  # as mean
    ddeviation_ptr,  # as deviation
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    elements,
    quads,
    TAIL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same draws once more. Arguments and grid as in ``average``."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    offset = offset.to(tl.int64)  # where it is interpreted, a small number is of 32 bits
    STORED: tl.constexpr = dy_ptr.dtype.element_ty
    element, inside, mean, deviation = _tile(mean_ptr, deviation_ptr, elements, BLOCK, WIDE)
    by_mean = tl.zeros([BLOCK], tl.float32)
    by_deviation = tl.zeros([BLOCK], tl.float32)
    for _ in range(bound(quads)):
        e0, e1, e2, e3 = _four(element, seed, offset)
        sums = _plus_slopes((by_mean, by_deviation), mean, deviation, e0, ACTIVATION, STORED)
        sums = _plus_slopes(sums, mean, deviation, e1, ACTIVATION, STORED)
        sums = _plus_slopes(sums, mean, deviation, e2, ACTIVATION, STORED)
        by_mean, by_deviation = _plus_slopes(sums, mean, deviation, e3, ACTIVATION, STORED)
        offset += FOUR_DRAWS
    if TAIL > 0:
        e0, e1, e2, _ = _four(element, seed, offset)
        by_mean, by_deviation = _plus_slopes((by_mean, by_deviation), mean, deviation, e0, ACTIVATION, STORED)
        if TAIL > 1:
            by_mean, by_deviation = _plus_slopes(
                (by_mean, by_deviation), mean, deviation, e1, ACTIVATION, STORED
            )
        if TAIL > 2:
            by_mean, by_deviation = _plus_slopes(
                (by_mean, by_deviation), mean, deviation, e2, ACTIVATION, STORED
            )
    dy = upcast(tl.load(dy_ptr + element, mask=inside, other=0.0)) / (quads * 4 + TAIL).to(tl.float32)
    tl.store(dmean_ptr + element, (dy * by_mean).to(dmean_ptr.dtype.element_ty), mask=inside)
    tl.store(ddeviation_ptr + element, (dy * by_deviation).to(ddeviation_ptr.dtype.element_ty), mask=inside)
