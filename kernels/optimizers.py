"""Steps of SGD and Adam with every regularizer of the weights in the same pass over memory.

What a step does to a tensor with parameters p and gradient g, in this order; what is not asked for is absent:

    skip       nothing at all, not even counting the step, where an infinity was found (GradScaler)
    t          t + 1
    g          g (+-1 / scale) min(1, max_grad_norm / |all g|)         maximize, unscale, clip
    g          g + weight_decay p + l1 sign(p)                         coupled L2 (SGD, Adam), L1 as a subgradient
    SGD        m = momentum m + (1 - dampening) g  (g itself at t = 1);   u = lr m,  or lr (g + momentum m) (Nesterov)
    Adam       m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2;   w = max(w, v) (AMSGrad)
               u = lr / (1 - beta1^t) m / (sqrt(v or w) / sqrt(1 - beta2^t) + eps)
    p          p (1 - lr weight_decay)                                 decoupled (SGDW, AdamW)
                  or p (1 - weight_decay lr / lr_0): ``decouple_lr``; only where u p >= 0: ``cautious``
    p          p - u
    p          sign(p) max(|p| - lr l1, 0)                             L1 as a proximal step: exact zeros
    p          p min(1, max_norm / |p|)                                of each row, or of the tensor
    store      rounded to the nearest or at random; the fp32 master unrounded
    ema        ema + (1 - ema_decay) (p - ema)

Sources: Loshchilov and Hutter 2019 (decoupled decay); Kingma and Ba 2015; Reddi et al. 2018 (AMSGrad); Sutskever et al.
2013 (the form of Nesterov that torch has); Chen et al. 2025, arXiv:2510.12402 (cautious); Srivastava et al. 2014
(max-norm of the incoming weights of a unit); Parikh and Boyd 2014 (proximal L1).
With lr = 0 a step projects nothing, shrinks nothing and averages nothing: so distributed checkpoints make state.

Two launches whatever is on: ``advance`` resolves all numbers of each tensor into 16 fp64 scalars, with one thread a
tensor; ``step`` passes over the elements. Clipping has ``squares`` before them, which reads g once more. A max-norm
over more elements than a tile holds (ROW_MOST) leaves sums of squares of its tiles, ``fold`` adds them up in order,
and ``project`` touches only the rows that lie outside of the ball (and takes the average on itself).

A tail, or a tile that 16-byte accesses do not reach, is done in a loop over pieces of one element a thread.

Cost, bytes an element of fp32: SGD 12, with momentum 20, Adam and AdamW 28 (read p, g, m, v; write p, m, v), AMSGrad
36; clipping 4 more, an average 8 more. bf16 throughout: 6, 10, 14. bf16 with masters: p written, g read, master, m
and v read and written: 28. Those are the floors: every value that must be read, once, and every one that is written,
once. The arithmetic is about 20 instructions an element, of 100 to 270 for which the memory of an H100 leaves time.

The plain twin is plain/optimizers.py. What this one does otherwise:
- One launch for all tensors of a dtype, by a table of addresses; the plain one takes a launch for each.
- Schedules, step counters, loss scale and clipping stay on the device: the host never waits, and CUDA graphs replay it.
- Averages, L1, max-norm and random rounding in the same pass: each would read the parameters once more.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .fastmath import bound, reciprocal, sqrt, upcast
from .multi_tensor import aligned, chunk, chunk_end, elements, entry, read, write
from .philox import lanes
from .ptxas import terms

# The lists of the table of entries, then three rows of numbers.
PARAMETER = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
FIRST = tl.constexpr(2)  # momentum_buffer, exp_avg
SECOND = tl.constexpr(3)  # exp_avg_sq
LARGEST = tl.constexpr(4)  # max_exp_avg_sq
MASTER = tl.constexpr(5)
AVERAGE = tl.constexpr(6)
STEP = tl.constexpr(7)  # fp32 [1] on the device
ROW = tl.constexpr(8)  # elements in a row of the max-norm; 0 without one
GROUP = tl.constexpr(9)
ORDINAL = tl.constexpr(10)  # the place of the parameter in its optimizer: the key of its random bits

# The scalars of a tensor: what ``advance`` writes and ``step`` reads.
SCALARS = tl.constexpr(16)
LIVE = tl.constexpr(0)
GAIN = tl.constexpr(1)
COUPLED = tl.constexpr(2)
SUBGRADIENT = tl.constexpr(3)
STEP_SIZE = tl.constexpr(4)
DECAY_FACTOR = tl.constexpr(5)
THRESHOLD = tl.constexpr(6)
RADIUS = tl.constexpr(7)
AVERAGE_SHARE = tl.constexpr(8)
DECAY_1 = tl.constexpr(9)
GAIN_1 = tl.constexpr(10)
DECAY_2 = tl.constexpr(11)
GAIN_2 = tl.constexpr(12)
ROOT = tl.constexpr(13)
EPS = tl.constexpr(14)
COUNT = tl.constexpr(15)

# The numbers of a group: what the host writes and ``advance`` reads.
NUMBERS = tl.constexpr(16)
LR = tl.constexpr(0)
LR_0 = tl.constexpr(1)  # of ``decouple_lr``; 0 where decay goes with lr
L2 = tl.constexpr(2)  # coupled
DECAY = tl.constexpr(3)  # decoupled
BETA_1 = tl.constexpr(4)  # or momentum
BETA_2 = tl.constexpr(5)  # or dampening
EPSILON = tl.constexpr(6)
SIGN = tl.constexpr(7)
L1_SUBGRADIENT = tl.constexpr(8)
L1_PROXIMAL = tl.constexpr(9)
MAX_NORM = tl.constexpr(10)  # infinite where there is none
MAX_GRAD_NORM = tl.constexpr(11)
EMA = tl.constexpr(12)  # 1 - ema_decay


class Plan(NamedTuple):
    """What ``step`` is compiled for."""

    adam: bool
    momentum: bool  # there is a first moment
    nesterov: bool
    amsgrad: bool
    cautious: bool
    pulled: bool  # coupled L2 or a subgradient of L1, in some group
    shrunk: bool  # proximal L1, in some group
    projection: str  # "none"; "rows": in the tile; "partial": its first half
    master: bool
    average: bool
    at_random: bool  # the parameter is bf16
    parameter: Any  # dtypes: of the parameter, its gradient and its moments
    gradient: Any
    moment: Any
    compute: Any  # fp32, or fp64; that of masters and averages too
    width: int  # a power of 2 that a row fits into ("rows")
    block: int
    vector: int  # elements of the narrowest of these types in 16 bytes


class Projection(NamedTuple):
    """What ``project`` is compiled for: as in ``Plan``."""

    master: bool
    average: bool
    parameter: Any
    compute: Any
    block: int
    vector: int


@triton.jit(do_not_specialize=["tensors"])
def advance(
    entries_ptr,  # int64 [11, tensors]
    groups_ptr,  # fp64 [groups, NUMBERS]
    scalars_ptr,  # fp64 [tensors, SCALARS], written
    squared_ptr,  # fp64 [1]: the sum of squares of all gradients, or None without clipping
    norm_ptr,  # fp32 [1]: the norm of the unscaled gradients is written here, or None
    scale_ptr,  # fp32 [1] that gradients were multiplied with, or None
    found_inf_ptr,  # fp32 [1], not 0 where the step is skipped, or None
    tensors,
    ADAM: tl.constexpr,
    COUNTS: tl.constexpr,  # there are step counters (SGD: for a first step that is not dampened, or random bits)
    BLOCK: tl.constexpr,
):
    """Counts the steps and resolves the numbers of each tensor. Grid: (ceil(tensors / BLOCK),)."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    group = groups_ptr + tl.load(entries_ptr + GROUP * tensors + tensor, mask=inside, other=0) * NUMBERS
    row = scalars_ptr + tensor * SCALARS
    live = tl.full([BLOCK], 1.0, tl.float64)
    if found_inf_ptr is not None:
        live = tl.where(tl.load(found_inf_ptr + tl.zeros([BLOCK], tl.int32)) == 0.0, 1.0, 0.0).to(tl.float64)

    t = tl.full([BLOCK], 1.0, tl.float64)
    if COUNTS:
        counter = tl.load(entries_ptr + STEP * tensors + tensor, mask=inside, other=0)
        counter = counter.to(tl.pointer_type(tl.float32))
        t += tl.load(counter, mask=inside, other=0.0).to(tl.float64)
        tl.store(counter, t.to(tl.float32), mask=inside & (live != 0.0))

    gain = tl.load(group + SIGN)
    if scale_ptr is not None:
        gain /= tl.load(scale_ptr).to(tl.float64)
    if squared_ptr is not None:
        norm = tl.sqrt(tl.load(squared_ptr))
        if scale_ptr is not None:
            norm /= tl.abs(tl.load(scale_ptr).to(tl.float64))
        most = tl.load(group + MAX_GRAD_NORM)
        gain *= tl.where(
            norm <= most, 1.0, most / tl.where(norm == 0.0, 1.0, norm)
        )  # a NaN is for all gradients, as in torch
        tl.store(norm_ptr, norm.to(tl.float32), mask=tl.program_id(0) == 0)

    lr = tl.load(group + LR)
    moves = lr != 0.0
    lr_0 = tl.load(group + LR_0)
    decay = tl.load(group + DECAY)
    beta_1 = tl.load(group + BETA_1)
    beta_2 = tl.load(group + BETA_2)
    if ADAM:
        size = lr / (1.0 - tl.exp2(t * tl.log2(beta_1)))
        tl.store(row + GAIN_1, 1.0 - beta_1, mask=inside)
        tl.store(row + GAIN_2, 1.0 - beta_2, mask=inside)
        tl.store(row + DECAY_1, beta_1, mask=inside)
        tl.store(row + DECAY_2, beta_2, mask=inside)
        tl.store(row + ROOT, 1.0 / tl.sqrt(1.0 - tl.exp2(t * tl.log2(beta_2))), mask=inside)
        tl.store(row + EPS, tl.load(group + EPSILON), mask=inside)
    else:
        size = lr
        first = (t <= 1.0) & COUNTS
        tl.store(row + DECAY_1, tl.where(first, 0.0, beta_1), mask=inside)  # the gradient itself, undamped
        tl.store(row + GAIN_1, tl.where(first, 1.0, 1.0 - beta_2), mask=inside)
        tl.store(row + DECAY_2, beta_1, mask=inside)  # of Nesterov, which takes it at once
    tl.store(row + LIVE, live, mask=inside)
    tl.store(row + GAIN, gain, mask=inside)
    tl.store(row + COUPLED, tl.load(group + L2), mask=inside)
    tl.store(row + SUBGRADIENT, tl.load(group + L1_SUBGRADIENT), mask=inside)
    tl.store(row + STEP_SIZE, size, mask=inside)
    with_schedule = tl.where(lr_0 == 0.0, lr, lr / tl.where(lr_0 == 0.0, 1.0, lr_0))
    tl.store(row + DECAY_FACTOR, 1.0 - with_schedule * decay, mask=inside)
    tl.store(row + THRESHOLD, lr * tl.load(group + L1_PROXIMAL), mask=inside)
    tl.store(row + RADIUS, tl.where(moves, tl.load(group + MAX_NORM), float("inf")), mask=inside)
    tl.store(row + AVERAGE_SHARE, tl.where(moves, tl.load(group + EMA), 0.0), mask=inside)
    tl.store(row + COUNT, t, mask=inside)


@triton.jit
def _number(row, WHICH: tl.constexpr, COMPUTE: tl.constexpr):
    return tl.load(row + WHICH).to(COMPUTE)


@triton.jit
def _rounded_at_random(x, index, key, count, LANES: tl.constexpr):
    """fp32 to what bf16 can hold, up with the probability of what is cut off. Infinities and NaN stay themselves.

    Sixteen random bits an element are added to the sixteen that bf16 does not have, and those are cut off. index: of
    groups of LANES elements. An element's bits are those of its place in the tensor, whatever the tile.
    """
    bits = tl.reshape(lanes(index, key, count, LANES), x.shape) >> 16
    pattern = x.to(tl.uint32, bitcast=True)
    rounded = ((pattern + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((pattern & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def _tile(
    entries_ptr, row, tensors, tensor, first, length, limit,
    plan: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK elements from ``first`` on, below ``limit``; of whole rows, where the projection is of rows."""
    P: tl.constexpr = plan.parameter
    G: tl.constexpr = plan.gradient
    S: tl.constexpr = plan.moment
    COMPUTE: tl.constexpr = plan.compute
    WIDTH: tl.constexpr = plan.width
    VECTOR: tl.constexpr = plan.vector
    LANES: tl.constexpr = 8 if ALIGNED else 1
    if plan.projection == "rows":
        if ALIGNED:  # as products, see ``elements``
            length = length // VECTOR * VECTOR
            first = first // VECTOR * VECTOR
        start = first + tl.arange(0, BLOCK // WIDTH).to(tl.int64)[:, None] * length
        column = tl.arange(0, WIDTH)[None, :]
        element = start + column
        mask = (start < limit) & (column < length)
        index = start // LANES + tl.arange(0, WIDTH // LANES if WIDTH > LANES else 1)[None, :]
    else:
        element = elements(first, BLOCK, VECTOR, ALIGNED)
        mask = None if ALIGNED else element < limit
        index = first // LANES + tl.arange(0, BLOCK // LANES)

    g = read(entry(entries_ptr, tensors, tensor, GRADIENT), element, mask, G, ALIGNED).to(COMPUTE)
    p_address = entry(entries_ptr, tensors, tensor, PARAMETER)
    if plan.master:
        master_address = entry(entries_ptr, tensors, tensor, MASTER)
        p = read(master_address, element, mask, COMPUTE, ALIGNED)
    else:
        p = read(p_address, element, mask, P, ALIGNED)
    if plan.momentum:
        m_address = entry(entries_ptr, tensors, tensor, FIRST)
        m = read(m_address, element, mask, S, ALIGNED)
    if plan.adam:
        v_address = entry(entries_ptr, tensors, tensor, SECOND)
        v = read(v_address, element, mask, S, ALIGNED)
    if plan.amsgrad:
        w_address = entry(entries_ptr, tensors, tensor, LARGEST)
        w = read(w_address, element, mask, S, ALIGNED)
    if plan.average and plan.projection != "partial":
        average_address = entry(entries_ptr, tensors, tensor, AVERAGE)
        average = read(average_address, element, mask, COMPUTE, ALIGNED)

    g *= _number(row, GAIN, COMPUTE)
    if plan.pulled:
        pull = _number(row, SUBGRADIENT, COMPUTE)
        g += _number(row, COUPLED, COMPUTE) * p + tl.where(p > 0, pull, tl.where(p < 0, -pull, 0.0))

    size = _number(row, STEP_SIZE, COMPUTE)
    if plan.adam:
        m = m * _number(row, DECAY_1, COMPUTE) + g * _number(row, GAIN_1, COMPUTE)
        v = v * _number(row, DECAY_2, COMPUTE) + g * g * _number(row, GAIN_2, COMPUTE)
        write(m_address, element, m, mask, S, ALIGNED)
        write(v_address, element, v, mask, S, ALIGNED)
        if plan.amsgrad:
            v = tl.maximum(w, v, propagate_nan=tl.PropagateNan.ALL)
            write(w_address, element, v, mask, S, ALIGNED)
        root = sqrt(v) * _number(row, ROOT, COMPUTE)
        update = size * m * reciprocal(root + _number(row, EPS, COMPUTE))
    elif plan.momentum:
        decay = _number(row, DECAY_1, COMPUTE)
        # A first step takes nothing of the buffer, whatever is in there.
        m = tl.where(decay == 0.0, 0.0, m * decay) + g * _number(row, GAIN_1, COMPUTE)
        write(m_address, element, m, mask, S, ALIGNED)
        update = size * ((g + _number(row, DECAY_2, COMPUTE) * m) if plan.nesterov else m)
    else:
        update = size * g

    keep = _number(row, DECAY_FACTOR, COMPUTE)
    if plan.cautious:
        keep = tl.where(update * p >= 0.0, keep, 1.0)
    p = p * keep - update
    if plan.shrunk:
        threshold = _number(row, THRESHOLD, COMPUTE)
        p = tl.where(tl.abs(p) < threshold, 0.0, p - tl.where(p < 0, -threshold, threshold))
    if plan.projection != "none":
        inside = p if mask is None else tl.where(mask, p, 0.0)
        AXIS: tl.constexpr = 1 if plan.projection == "rows" else 0
        squared = tl.sum(terms(inside, inside, AXIS, VECTOR if ALIGNED else 1), AXIS)
        if plan.projection == "rows":
            radius = _number(row, RADIUS, COMPUTE)
            scale = tl.where(squared > radius * radius, radius / tl.sqrt(squared), 1.0)
            p *= scale[:, None]
    stored = p
    if plan.at_random:
        key = entry(entries_ptr, tensors, tensor, ORDINAL)
        stored = _rounded_at_random(p, index, key, tl.load(row + COUNT).to(tl.int64), LANES)
    stored = stored.to(P)
    write(p_address, element, stored, mask, P, ALIGNED)
    if plan.master:
        write(master_address, element, p, mask, COMPUTE, ALIGNED)
    if plan.average and plan.projection != "partial":
        followed = p if plan.master else upcast(stored)
        average += _number(row, AVERAGE_SHARE, COMPUTE) * (followed - average)
        write(average_address, element, average, mask, COMPUTE, ALIGNED)
    return squared if plan.projection == "partial" else size


@triton.jit(do_not_specialize=["tensors", "programs"])
def step(
    entries_ptr,  # int64 [11, tensors]
    chunks_ptr,  # int64 [3, programs]
    scalars_ptr,  # fp64 [tensors, SCALARS]
    partials_ptr,  # COMPUTE [programs]: sums of squares (the projection is "partial"), or None
    tensors,
    programs,
    plan: tl.constexpr,
):
    """One tile a program. Grid: (programs,)."""
    COMPUTE: tl.constexpr = plan.compute
    BLOCK: tl.constexpr = plan.block
    tensor, first = chunk(chunks_ptr, programs)
    row = scalars_ptr + tensor * SCALARS
    if tl.load(row + LIVE) != 0.0:
        addresses = entry(entries_ptr, tensors, tensor, PARAMETER) | entry(
            entries_ptr, tensors, tensor, GRADIENT
        )
        if plan.momentum:
            addresses |= entry(entries_ptr, tensors, tensor, FIRST)
        if plan.adam:
            addresses |= entry(entries_ptr, tensors, tensor, SECOND)
        if plan.amsgrad:
            addresses |= entry(entries_ptr, tensors, tensor, LARGEST)
        if plan.master:
            addresses |= entry(entries_ptr, tensors, tensor, MASTER)
        if plan.average:
            addresses |= entry(entries_ptr, tensors, tensor, AVERAGE)
        end = chunk_end(chunks_ptr, programs)
        wide = aligned(addresses) & (first % plan.vector == 0)
        PIECE: tl.constexpr = BLOCK if plan.projection == "rows" else BLOCK // 16
        length = first
        if plan.projection == "rows":
            length = entry(entries_ptr, tensors, tensor, ROW)
            wide &= length % plan.vector == 0
        else:
            wide &= first + BLOCK <= end
        if wide:
            squared = _tile(
                entries_ptr, row, tensors, tensor, first, length, end,
                plan, BLOCK, True,
            )  # fmt: skip
            if plan.projection == "partial":
                tl.store(partials_ptr + tl.program_id(0), squared)
        else:
            turn = length * (BLOCK // plan.width) if plan.projection == "rows" else PIECE
            squared = tl.zeros([], COMPUTE)
            for start in range(0, bound((end - first).to(tl.int32)), bound(turn)):
                squared += _tile(
                    entries_ptr, row, tensors, tensor, first + start, length, end,
                    plan, PIECE, False,
                )  # fmt: skip
            if plan.projection == "partial":
                tl.store(partials_ptr + tl.program_id(0), squared)


@triton.jit
def _square_tile(
    entries_ptr, tensors, tensor, first, limit,
    LIST: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    element = elements(first, BLOCK, VECTOR, ALIGNED)
    mask = None if ALIGNED else element < limit
    x = read(entry(entries_ptr, tensors, tensor, LIST), element, mask, DTYPE, ALIGNED)
    if not ALIGNED:
        x = tl.where(mask, x, 0.0)
    return tl.sum(terms(x, x, 0), 0)


@triton.jit(do_not_specialize=["tensors", "programs"])
def squares(
    entries_ptr,  # int64 [11, tensors]
    chunks_ptr,  # int64 [3, programs]
    partials_ptr,  # fp32 [programs], or fp64
    tensors,
    programs,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sums of the squares of each chunk of gradients. Grid: (programs,)."""
    tensor, first = chunk(chunks_ptr, programs)
    end = chunk_end(chunks_ptr, programs)
    wide = (
        aligned(entry(entries_ptr, tensors, tensor, GRADIENT))
        & (first % VECTOR == 0)
        & (first + BLOCK <= end)
    )
    if wide:
        total = _square_tile(entries_ptr, tensors, tensor, first, end, GRADIENT, DTYPE, BLOCK, VECTOR, True)
        tl.store(partials_ptr + tl.program_id(0), total)
    else:
        PIECE: tl.constexpr = BLOCK // 16
        total = tl.zeros([], partials_ptr.dtype.element_ty)
        for start in range(0, bound((end - first).to(tl.int32)), PIECE):
            total += _square_tile(
                entries_ptr, tensors, tensor, first + start, end, GRADIENT, DTYPE, PIECE, VECTOR, False
            )
        tl.store(partials_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["units"])
def fold(
    partials_ptr,  # fp32 or fp64 [chunks]
    units_ptr,  # int64 [2, units]: the first chunk of each, and how many it has
    squared_ptr,  # like partials, [units]
    units,
    BLOCK: tl.constexpr,
):
    """The sum over the chunks of each row of a max-norm, in their order. Grid: (units,)."""
    unit = tl.program_id(0)
    first = tl.load(units_ptr + unit)
    count = tl.load(units_ptr + units + unit).to(tl.int32)
    total = tl.zeros([BLOCK], partials_ptr.dtype.element_ty)
    for start in range(0, bound(count), BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + first + place, mask=place < count, other=0.0)
    tl.store(squared_ptr + unit, tl.sum(total, 0))


@triton.jit
def _project_tile(
    entries_ptr, row, tensors, tensor, first, limit, scale,
    plan: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = plan.parameter
    COMPUTE: tl.constexpr = plan.compute
    element = elements(first, BLOCK, plan.vector, ALIGNED)
    mask = None if ALIGNED else element < limit
    p_address = entry(entries_ptr, tensors, tensor, PARAMETER)
    if plan.master:
        master_address = entry(entries_ptr, tensors, tensor, MASTER)
        p = read(master_address, element, mask, COMPUTE, ALIGNED)
    else:
        p = read(p_address, element, mask, P, ALIGNED)
    p *= scale
    stored = p.to(P)
    if scale != 1.0:
        write(p_address, element, stored, mask, P, ALIGNED)
        if plan.master:
            write(master_address, element, p, mask, COMPUTE, ALIGNED)
    if plan.average:
        average_address = entry(entries_ptr, tensors, tensor, AVERAGE)
        average = read(average_address, element, mask, COMPUTE, ALIGNED)
        followed = p if plan.master else upcast(stored)
        average += _number(row, AVERAGE_SHARE, COMPUTE) * (followed - average)
        write(average_address, element, average, mask, COMPUTE, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "programs"])
def project(
    entries_ptr,  # int64 [11, tensors]
    chunks_ptr,  # int64 [3, programs]
    chunk_units_ptr,  # int64 [programs]: which row a chunk is of
    scalars_ptr,  # fp64 [tensors, SCALARS]
    squared_ptr,  # COMPUTE [units]
    tensors,
    programs,
    plan: tl.constexpr,
):
    """The second half of a max-norm over long rows: shortens those outside of the ball. Grid: (programs,)."""
    COMPUTE: tl.constexpr = plan.compute
    BLOCK: tl.constexpr = plan.block
    tensor, first = chunk(chunks_ptr, programs)
    row = scalars_ptr + tensor * SCALARS
    squared = tl.load(squared_ptr + tl.load(chunk_units_ptr + tl.program_id(0)))
    radius = _number(row, RADIUS, COMPUTE)
    outside = squared > radius * radius
    if (tl.load(row + LIVE) != 0.0) & (outside | plan.average):
        scale = tl.where(outside, radius / tl.sqrt(squared), 1.0)
        end = chunk_end(chunks_ptr, programs)
        addresses = entry(entries_ptr, tensors, tensor, PARAMETER)
        if plan.master:
            addresses |= entry(entries_ptr, tensors, tensor, MASTER)
        if plan.average:
            addresses |= entry(entries_ptr, tensors, tensor, AVERAGE)
        wide = aligned(addresses) & (first % plan.vector == 0) & (first + BLOCK <= end)
        if wide:
            _project_tile(
                entries_ptr, row, tensors, tensor, first, end, scale,
                plan, BLOCK, True,
            )  # fmt: skip
        else:
            PIECE: tl.constexpr = BLOCK // 16
            for start in range(0, bound((end - first).to(tl.int32)), PIECE):
                _project_tile(
                    entries_ptr, row, tensors, tensor, first + start, end, scale,
                    plan, PIECE, False,
                )  # fmt: skip
