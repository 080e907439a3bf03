"""The mean of an activation of normal variables: the inference of DropConnect (Wan et al. 2013).

    y[i]    = sum_d w[d] f(v)                 v = mean[i] + deviation[i] eps[i, d]
    dmean   = dy[i] sum_d w[d] f'(v)          ddeviation = dy[i] sum_d w[d] f'(v) eps[i, d]

``integrate`` is the trapezoidal rule: eps[d] and w[d] are its nodes and weights, the same for all elements, and
constants in the code.

``average`` draws, as in the paper: w[d] is 1/Z for Z draws, and eps[i, d] are standard normals, different for every
element: number d % 4 of Philox block i, under an offset whose upper half is increased by d // 4. These are the normals
of a tensor [elements, 4], with another stream for every four draws (``fastreg.random.draws``). None is stored.

Cost: mean, deviation and y once, for any number of terms. A term is the activation, an FMA before it and one after
it. A draw takes 20 instructions more: 13 for Philox, at four normals a call, and 7 for Box and Muller. That makes
27 (sigmoid) to 35 (tanh) in total (sm_90). The limit are the special functions, two for a normal and two for the
activation, at 8 issue slots each; with tanh, issue is the limit as much. So memory does not matter, and a thread
has one element: narrow accesses cost nothing, and a small layer still fills the GPU. Four elements a thread save 5
instructions for a draw, and take as long.

The sum is fp32, in the order of the terms.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from . import activation
from .fastmath import bound, upcast
from .philox import box_muller, philox

NOT_SPECIALIZED = ("seed_ptr", "seed", "offset", "quads")


class Forward(NamedTuple):
    """Pointers to fp32, fp16 or bf16 [elements], in any combination."""

    mean: tl.tensor
    deviation: tl.tensor
    y: tl.tensor


class Backward(NamedTuple):
    """Pointers to fp32, fp16 or bf16 [elements], in any combination."""

    dy: tl.tensor
    mean: tl.tensor
    deviation: tl.tensor
    dmean: tl.tensor
    ddeviation: tl.tensor


class Plan(NamedTuple):
    """Compile-time choices."""

    activation: str
    block: int  # elements of a program
    wide: bool  # 64-bit indices, for 2^31 elements and more
    tail: int = 0  # draws after the last four


class Elements(NamedTuple):
    """The elements of a program [block]."""

    number: tl.tensor
    inside: tl.tensor  # which of them exist
    mean: tl.tensor
    deviation: tl.tensor


class Draws(NamedTuple):
    """Four standard normals for each element."""

    e0: tl.tensor
    e1: tl.tensor
    e2: tl.tensor
    e3: tl.tensor


class Slopes(NamedTuple):
    """Sums of f'(v) and of f'(v) eps."""

    mean: tl.tensor
    deviation: tl.tensor


def _nodes(count: int, reach: float) -> tuple[tuple[float, float], ...]:
    """The positive half of ``count`` evenly spaced standard normal values up to ``reach``, and their weights."""
    values = [(2 * i + 1) * reach / (count - 1) for i in range(count // 2)]
    total = 2 * sum(math.exp(-0.5 * value**2) for value in values)
    return tuple((value, math.exp(-0.5 * value**2) / total) for value in values)


NODES = _nodes(48, 5.5)
FOUR_DRAWS = tl.constexpr(1 << 32)  # from the offset of four draws to that of the next four


@triton.jit
def _elements(tensors, elements, plan: tl.constexpr):
    block = tl.program_id(0)
    number = (block.to(tl.int64) if plan.wide else block) * plan.block + tl.arange(0, plan.block)
    inside = number < elements
    mean = upcast(tl.load(tensors.mean + number, mask=inside, other=0.0))
    deviation = upcast(tl.load(tensors.deviation + number, mask=inside, other=0.0))
    return Elements(number, inside, mean, deviation)


@triton.jit
def _values(at, e, stored: tl.constexpr, plan: tl.constexpr):
    """f(mean + deviation e). stored: the dtype of the result in memory."""
    NAME: tl.constexpr = plan.activation
    return activation.forward(tl.fma(at.deviation, e + tl.zeros_like(at.mean), at.mean), NAME, stored)


@triton.jit
def _slopes(at, e, stored: tl.constexpr, plan: tl.constexpr):
    """f'(mean + deviation e). stored: as in ``_values``."""
    NAME: tl.constexpr = plan.activation
    v = tl.fma(at.deviation, e + tl.zeros_like(at.mean), at.mean)
    return activation.backward(tl.full(v.shape, 1.0, tl.float32), v, NAME, stored)


@triton.jit
def _write_gradients(tensors, at, dy, sums):
    tl.store(tensors.dmean + at.number, (dy * sums.mean).to(tensors.dmean.dtype.element_ty), mask=at.inside)
    ddeviation = (dy * sums.deviation).to(tensors.ddeviation.dtype.element_ty)
    tl.store(tensors.ddeviation + at.number, ddeviation, mask=at.inside)


# --- by nodes ---------------------------------------------------------------------------------------------


@triton.jit
def integrate(tensors: Forward, elements, NODES: tl.constexpr, plan: tl.constexpr):
    """NODES: ((eps, weight), ...), the positive half. Grid: (blocks of elements,)."""
    STORED: tl.constexpr = tensors.y.dtype.element_ty
    at = _elements(tensors, elements, plan)
    total = tl.zeros_like(at.mean)
    for node in tl.static_range(len(NODES)):
        right = _values(at, NODES[node][0], STORED, plan)
        left = _values(at, -NODES[node][0], STORED, plan)
        total += (left + right) * NODES[node][1]
    tl.store(tensors.y + at.number, total.to(STORED), mask=at.inside)


@triton.jit
def integrate_backward(tensors: Backward, elements, NODES: tl.constexpr, plan: tl.constexpr):
    """Arguments and grid as in ``integrate``."""
    STORED: tl.constexpr = tensors.dy.dtype.element_ty
    at = _elements(tensors, elements, plan)
    by_mean = tl.zeros_like(at.mean)
    by_deviation = tl.zeros_like(at.mean)
    for node in tl.static_range(len(NODES)):
        right = _slopes(at, NODES[node][0], STORED, plan)
        left = _slopes(at, -NODES[node][0], STORED, plan)
        by_mean += (left + right) * NODES[node][1]
        by_deviation += (right - left) * (NODES[node][0] * NODES[node][1])
    dy = upcast(tl.load(tensors.dy + at.number, mask=at.inside, other=0.0))
    _write_gradients(tensors, at, dy, Slopes(by_mean, by_deviation))


# --- by draws ---------------------------------------------------------------------------------------------


@triton.jit
def _draws(at, seed, offset):
    r0, r1, r2, r3 = philox(at.number, seed, offset)
    e0, e1 = box_muller(r0, r1)
    e2, e3 = box_muller(r2, r3)
    return Draws(e0, e1, e2, e3)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def average(
    tensors: Forward,
    seed_ptr,  # int64 [1], or None: then ``seed``
    seed: tl.int64,
    offset: tl.int64,
    elements,
    quads,  # draws, in fours
    plan: tl.constexpr,
):
    """Grid: (blocks of elements,)."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    offset = offset.to(tl.int64)  # the interpreter takes a small number for int32
    STORED: tl.constexpr = tensors.y.dtype.element_ty
    at = _elements(tensors, elements, plan)
    total = tl.zeros_like(at.mean)
    for _ in range(bound(quads)):
        draws = _draws(at, seed, offset)
        a = _values(at, draws.e0, STORED, plan) + _values(at, draws.e1, STORED, plan)
        b = _values(at, draws.e2, STORED, plan) + _values(at, draws.e3, STORED, plan)
        total += a + b
        offset += FOUR_DRAWS
    if plan.tail > 0:
        last = _draws(at, seed, offset)
        total += _values(at, last.e0, STORED, plan)
        if plan.tail > 1:
            total += _values(at, last.e1, STORED, plan)
        if plan.tail > 2:
            total += _values(at, last.e2, STORED, plan)
    samples = (quads * 4 + plan.tail).to(tl.float32)
    tl.store(tensors.y + at.number, (total / samples).to(STORED), mask=at.inside)


@triton.jit
def _plus_slopes(sums, at, e, stored: tl.constexpr, plan: tl.constexpr):
    slope = _slopes(at, e, stored, plan)
    return Slopes(sums.mean + slope, tl.fma(slope, e, sums.deviation))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def average_backward(
    tensors: Backward,
    seed_ptr,
    seed: tl.int64,
    offset: tl.int64,
    elements,
    quads,
    plan: tl.constexpr,
):
    """Draws the same numbers again. Arguments and grid as in ``average``."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    offset = offset.to(tl.int64)  # the interpreter takes a small number for int32
    STORED: tl.constexpr = tensors.dy.dtype.element_ty
    at = _elements(tensors, elements, plan)
    sums = Slopes(tl.zeros_like(at.mean), tl.zeros_like(at.mean))
    for _ in range(bound(quads)):
        draws = _draws(at, seed, offset)
        sums = _plus_slopes(sums, at, draws.e0, STORED, plan)
        sums = _plus_slopes(sums, at, draws.e1, STORED, plan)
        sums = _plus_slopes(sums, at, draws.e2, STORED, plan)
        sums = _plus_slopes(sums, at, draws.e3, STORED, plan)
        offset += FOUR_DRAWS
    if plan.tail > 0:
        last = _draws(at, seed, offset)
        sums = _plus_slopes(sums, at, last.e0, STORED, plan)
        if plan.tail > 1:
            sums = _plus_slopes(sums, at, last.e1, STORED, plan)
        if plan.tail > 2:
            sums = _plus_slopes(sums, at, last.e2, STORED, plan)
    samples = (quads * 4 + plan.tail).to(tl.float32)
    dy = upcast(tl.load(tensors.dy + at.number, mask=at.inside, other=0.0)) / samples
    _write_gradients(tensors, at, dy, sums)
