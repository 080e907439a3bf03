"""Local response normalization across channels, with what follows it, in one pass: y = f(x_c d_c^-beta + residual).

    d_c = k + alpha/n sum of x_j^2 over the n channels j from c - n//2 to c + (n-1)//2

Channels outside the tensor count as zeros. Source: Krizhevsky, Sutskever and Hinton 2012, section 3.3, which sums
where torch takes the mean: its alpha is our alpha/n. With g = dy f'(...),

    dx_c = g_c d_c^-beta - 2 alpha beta/n x_c sum of g_j x_j d_j^(-beta-1) over j from c - (n-1)//2 to c + n//2

Nothing is saved but x (and the residual, where f needs it): d is computed again.

A dense tensor is [samples, channels, inner] in memory order, where inner is the stride of the channels. A thread
computes up to 16 neighbouring channels. It loads them with those that their windows reach, and keeps each in registers
of its own: a tensor in a tuple. The layouts differ in where the tuple comes from:

    inner > 1 (contiguous)     a channel is a tile [ROWS, VECTOR] of positions, one access; they are loaded one after
                               the other as the window moves, so that few are in registers at a time
    inner = 1 (channels_last)  a row of memory is the channels of one position: an access brings VECTOR of them,
                               which the thread takes apart and puts together again, without any other thread

Cost, e bytes an element: forward reads x (+ residual) and writes y, 2e (3e); backward reads dy and x (+ residual) and
writes dx (+ the residual's gradient), 3e (5e). Device memory is read once: the channels that a window takes from a
neighbour come from L1 (channels_last: the neighbour is a thread of the program) or from L2 (contiguous: it is the
next program, as blocks of channels are innermost in the grid). For n = 5, L2 then delivers 1.25 (forward) and 1.375
(backward) times what is read from memory.

Arithmetic: sums over 2, 4, 8 ... neighbours are shared, so a window costs log2 n additions, and no subtraction,
which would lose digits and let a NaN out of its window. A power of d is 2 special-function results (16 of the 38 issue
slots that a bf16 element of forward has on an H100), 3 in backward where beta is not 3/4. Backward computes d and g
of n - 1 channels more than it owns. Together about 13 to 17 instructions forward and 31 backward (n = 5, bf16).
``fastreg inspect`` counts them.

Accuracy (fp32): d^-3/4 is r sqrt(r), r = d^-1/2, with a relative error of 3e-7 for every d. Another beta is
exp2(-beta log2 d): 2e-7 beta max(1, |log2 d|).

The plain twin is plain/local_response_norm.py. What this one does otherwise:
- A program walks over the channels of a block and keeps the window in registers: n reads an element become one, and
  backward n windows of n channels become one.
- Sums over neighbours are shared: log2 n additions a window, not n - 1.
- Channels last, where the window lies within a thread's vectors.
- beta = 3/4 by two reciprocal square roots and no logarithm.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import activation
from .fastmath import exp2, log2, reciprocal, sqrt, upcast


class Forward(NamedTuple):
    """Pointers to fp64, fp32, fp16 or bf16 [samples, channels, inner]: dense tensors in memory order."""

    x: tl.tensor
    residual: tl.tensor  # or None
    y: tl.tensor


class Backward(NamedTuple):
    """Pointers to tensors laid out as forward's x."""

    dy: tl.tensor
    x: tl.tensor  # forward's
    residual: tl.tensor  # forward's, or None where there is none or f is the identity
    dx: tl.tensor
    dresidual: tl.tensor  # or None where it is not needed or equals dy


class View(NamedTuple):
    """The tensor as a kernel is given it: integers."""

    samples: tl.tensor
    channel_vectors: tl.tensor  # ``last``: channels / vector; else channels
    inner_vectors: tl.tensor  # ``last``: 1; else inner / vector


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    before: int  # channels of a window before its own ...
    after: int  # ... and behind it, at most channels - 1 each
    three_quarters: bool  # beta is 3/4
    activation: str | None
    channels: int  # of a block; ``last``: a multiple of the vector
    rows: int
    vector: int
    last: bool  # channels are innermost in memory
    wide: bool  # 64-bit indices, for 2^31 elements and more


class Numbers(NamedTuple):
    scale: tl.tensor  # alpha/n
    beta: tl.tensor
    k: tl.tensor


class Shape(NamedTuple):
    channels: tl.tensor
    inner: tl.tensor


class Place(NamedTuple):
    """Where a block lies: values for each of its rows [rows, 1].

    A row is a vector of positions or, where channels are last, the channels of one position.
    """

    channel: tl.tensor  # the first one; [1, 1] where channels are not last
    first: tl.tensor  # the index of its element
    inside: tl.tensor


@triton.jit
def _index(number, plan: tl.constexpr):
    """A number in the type of element indices: 64 bits only where the tensor needs them."""
    return number.to(tl.int64) if plan.wide else number


@triton.jit
def _shape_of(view, plan: tl.constexpr):
    """As products, so that the compiler sees that vectors are aligned, and inside as a whole or not at all."""
    if plan.last:
        return Shape(view.channel_vectors * plan.vector, 1)
    else:
        return Shape(view.channel_vectors, _index(view.inner_vectors, plan) * plan.vector)


@triton.jit
def _constant(number, like):
    """A number that came as fp64 in the dtype that is computed in."""
    return tl.full([1], number, like.dtype)


@triton.jit
def _place(view, channels, plan: tl.constexpr):
    row = tl.arange(0, plan.rows)[:, None]
    blocks = tl.cdiv(channels, plan.channels)
    if plan.last:
        block = _index(tl.program_id(0), plan) * plan.rows + row
        position = block // blocks
        channel = (block - position * blocks) * plan.channels
        return Place(channel, position * channels + channel, position < view.samples)
    else:
        tile = tl.program_id(0) // blocks
        channel = (tl.program_id(0) - tile * blocks) * plan.channels
        vector = _index(tile, plan) * plan.rows + row
        sample = vector // view.inner_vectors
        first = (sample * (channels - 1) + channel) * view.inner_vectors + vector
        # As a tensor: the interpreter makes integers of a tensor & a number.
        return Place(tl.full([1, 1], channel, tl.int32), first * plan.vector, sample < view.samples)


@triton.jit
def _unpacked(x, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """[ROWS, VECTOR], a row in one thread, as VECTOR tensors [ROWS]."""
    parts = (x,)
    for level in tl.static_range(3):
        if VECTOR >> level > 1:
            halves = ()
            for i in tl.static_range(len(parts)):
                pair = tl.reshape(parts[i], [ROWS, 2, VECTOR >> (level + 1)])
                halves += tl.split(tl.trans(pair, 0, 2, 1))
            parts = halves
    found = ()
    for i in tl.static_range(VECTOR):
        found += (tl.reshape(parts[i], [ROWS]),)
    return found


@triton.jit
def _packed(parts, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """The inverse of ``_unpacked``."""
    found = ()
    for i in tl.static_range(VECTOR):
        found += (tl.reshape(parts[i], [ROWS, 1]),)
    for level in tl.static_range(3):
        if VECTOR >> level > 1:
            pairs = ()
            for i in tl.static_range(len(found) // 2):
                pair = tl.trans(tl.join(found[2 * i], found[2 * i + 1]), 0, 2, 1)
                pairs += (tl.reshape(pair, [ROWS, 2 << level]),)
            found = pairs
    return found[0]


@triton.jit
def _row(x_ptr, place, shape, START: tl.constexpr, STOP: tl.constexpr, plan: tl.constexpr):
    """What ``_take`` takes from where channels are last: those from START to STOP, rounded to whole vectors."""
    ROWS: tl.constexpr = plan.rows
    VECTOR: tl.constexpr = plan.vector
    found = ()
    for i in tl.static_range(START // VECTOR * VECTOR, STOP, VECTOR):
        wanted = place.inside & (place.channel + i >= 0) & (place.channel + i < shape.channels)
        x = tl.load(x_ptr + (place.first + i) + tl.arange(0, VECTOR)[None, :], mask=wanted, other=0.0)
        found += _unpacked(upcast(x), ROWS, VECTOR)
    return found[START % VECTOR : START % VECTOR + STOP - START]


@triton.jit
def _take(
    source, place, shape, FIRST: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr, plan: tl.constexpr
):
    """The channels from START to STOP, counted from the block's first, a tensor each; 0 outside the tensor.

    source: a tensor's pointer; where channels are last, the ``_row`` that begins with channel FIRST.
    """
    if plan.last:
        return source[START - FIRST : STOP - FIRST]
    else:
        lane = tl.arange(0, plan.vector)[None, :]
        found = ()
        for i in tl.static_range(START, STOP):
            wanted = place.inside & (place.channel + i >= 0) & (place.channel + i < shape.channels)
            x = tl.load(source + i * shape.inner + (place.first + lane), mask=wanted, other=0.0)
            found += (upcast(x),)
        return found


@triton.jit
def _store(y_ptr, values, place, shape, START: tl.constexpr, plan: tl.constexpr):
    """The block's channels from START."""
    ROWS: tl.constexpr = plan.rows
    VECTOR: tl.constexpr = plan.vector
    lane = tl.arange(0, VECTOR)[None, :]
    if plan.last:
        for i in tl.static_range(0, len(values), VECTOR):
            y = _packed(values[i : i + VECTOR], ROWS, VECTOR).to(y_ptr.dtype.element_ty)
            wanted = place.inside & (place.channel + START + i < shape.channels)
            tl.store(y_ptr + (place.first + START + i) + lane, y, mask=wanted)
    else:
        for i in tl.static_range(len(values)):
            y = values[i].to(y_ptr.dtype.element_ty)
            wanted = place.inside & (place.channel + START + i < shape.channels)
            tl.store(y_ptr + (START + i) * shape.inner + (place.first + lane), y, mask=wanted)


@triton.jit
def _sums(a, b, SHIFT: tl.constexpr):
    found = ()
    for i in tl.static_range(len(b) - SHIFT):
        found += (a[i] + b[i + SHIFT],)
    return found


@triton.jit
def _window_sums(terms, SIZE: tl.constexpr):
    """The sums of SIZE neighbours: as many as there are whole windows. SIZE < 32."""
    total = terms
    for bit in tl.static_range(5):
        # ``terms`` are sums of 2^bit neighbours, ``total`` of as many as the bits of SIZE below this one say.
        if SIZE >> bit & 1:
            total = _sums(total, terms, SIZE % (1 << bit)) if SIZE % (1 << bit) else terms
        if SIZE >> (bit + 1):
            terms = _sums(terms, terms, 1 << bit)
    return total


@triton.jit
def _denominators(x, numbers, SIZE: tl.constexpr):
    """k + scale (sum of x^2) of every whole window."""
    squares = ()
    for i in tl.static_range(len(x)):
        squares += (x[i] * x[i],)
    sums = _window_sums(squares, SIZE)
    found = ()
    for i in tl.static_range(len(sums)):
        found += (sums[i] * _constant(numbers.scale, x[0]) + _constant(numbers.k, x[0]),)
    return found


@triton.jit
def _power(d, beta, plan: tl.constexpr):
    """d^-beta and 1/d."""
    if plan.three_quarters:
        root = tl.rsqrt(d)
        return root * sqrt(root), root * root
    else:
        return exp2(log2(d) * _constant(-beta, d)), reciprocal(d)


@triton.jit
def forward(
    tensors: Forward,
    scale: tl.float64,  # alpha/n
    beta: tl.float64,
    k: tl.float64,  # > 0, as scale is, so that d is
    view: View,
    plan: tl.constexpr,
):
    """One block of channels and rows a program; grid: (channel blocks x row blocks,)."""
    shape = _shape_of(view, plan)
    place = _place(view, shape.channels, plan)
    numbers = Numbers(scale, beta, k)
    BEFORE: tl.constexpr = plan.before
    AFTER: tl.constexpr = plan.after
    ACTIVATION: tl.constexpr = plan.activation
    CHANNELS: tl.constexpr = plan.channels
    REACH: tl.constexpr = BEFORE + AFTER
    STEP: tl.constexpr = plan.vector if plan.last else 1
    x_source, residual_source = tensors.x, tensors.residual
    if plan.last:
        x_source = _row(tensors.x, place, shape, -BEFORE, CHANNELS + AFTER, plan)
        if tensors.residual is not None:
            residual_source = _row(tensors.residual, place, shape, 0, CHANNELS, plan)
    x = _take(x_source, place, shape, -BEFORE, -BEFORE, AFTER, plan)
    for start in tl.static_range(0, CHANNELS, STEP):
        # The channels of STEP whole windows: of the last step's, what these reach back to, and STEP new ones.
        x = x[len(x) - REACH :] + _take(
            x_source, place, shape, -BEFORE, start + AFTER, start + AFTER + STEP, plan
        )
        if tensors.residual is not None:
            residual = _take(residual_source, place, shape, 0, start, start + STEP, plan)
        d = _denominators(x, numbers, REACH + 1)
        y = ()
        for i in tl.static_range(STEP):
            v = x[BEFORE + i] * _power(d[i], beta, plan)[0]
            if tensors.residual is not None:
                v += residual[i].to(v.dtype)
            y += (activation.forward(v, ACTIVATION, tensors.x.dtype.element_ty),)
        _store(tensors.y, y, place, shape, start, plan)


@triton.jit
def _gradients(x, dy, residual, numbers, STORED: tl.constexpr, plan: tl.constexpr):
    """g, g d^-beta and g x d^(-beta-1) of every channel whose whole window is in ``x``."""
    ACTIVATION: tl.constexpr = plan.activation
    d = _denominators(x, numbers, plan.before + plan.after + 1)
    gs, direct, through_d = (), (), ()
    for i in tl.static_range(len(d)):
        power, inverse = _power(d[i], numbers.beta, plan)
        v = x[plan.before + i] * power
        g = dy[i].to(v.dtype)
        if ACTIVATION is not None:
            before_activation = v if residual is None else v + residual[i].to(v.dtype)
            g = activation.backward(g, before_activation, ACTIVATION, STORED)
        gs += (g,)
        direct += (g * power,)
        through_d += (g * v * inverse,)  # in this order nothing underflows that matters
    return gs, direct, through_d


@triton.jit
def backward(
    tensors: Backward,
    scale: tl.float64,
    beta: tl.float64,
    k: tl.float64,
    view: View,
    plan: tl.constexpr,
):
    """Arguments and grid as in ``forward``."""
    shape = _shape_of(view, plan)
    place = _place(view, shape.channels, plan)
    numbers = Numbers(scale, beta, k)
    BEFORE: tl.constexpr = plan.before
    AFTER: tl.constexpr = plan.after
    CHANNELS: tl.constexpr = plan.channels
    REACH: tl.constexpr = BEFORE + AFTER
    STEP: tl.constexpr = plan.vector if plan.last else 1
    STORED: tl.constexpr = tensors.x.dtype.element_ty
    x_source, dy_source, residual_source = tensors.x, tensors.dy, tensors.residual
    if plan.last:
        x_source = _row(tensors.x, place, shape, -REACH, CHANNELS + REACH, plan)
        dy_source = _row(tensors.dy, place, shape, -AFTER, CHANNELS + BEFORE, plan)
        if tensors.residual is not None:
            residual_source = _row(tensors.residual, place, shape, -AFTER, CHANNELS + BEFORE, plan)

    # Channel c is in the windows of the channels from c - AFTER to c + BEFORE, and these reach as far again.
    x = _take(x_source, place, shape, -REACH, -REACH, REACH, plan)
    dy = _take(dy_source, place, shape, -AFTER, -AFTER, BEFORE, plan)
    residual = None
    if tensors.residual is not None:
        residual = _take(residual_source, place, shape, -AFTER, -AFTER, BEFORE, plan)
    g, direct, through_d = _gradients(x, dy, residual, numbers, STORED, plan)
    for start in tl.static_range(0, CHANNELS, STEP):
        x = x[len(x) - REACH :] + _take(
            x_source, place, shape, -REACH, start + REACH, start + REACH + STEP, plan
        )
        dy = _take(dy_source, place, shape, -AFTER, start + BEFORE, start + BEFORE + STEP, plan)
        if tensors.residual is not None:
            residual = _take(
                residual_source, place, shape, -AFTER, start + BEFORE, start + BEFORE + STEP, plan
            )
        new_g, new_direct, new_through_d = _gradients(x, dy, residual, numbers, STORED, plan)
        g = g[len(g) - BEFORE :] + new_g
        direct = direct[len(direct) - BEFORE :] + new_direct
        through_d = through_d[len(through_d) - REACH :] + new_through_d
        sums = _window_sums(through_d, REACH + 1)
        dx = ()
        for i in tl.static_range(STEP):
            dx += (direct[i] + _constant(-2.0 * scale * beta, x[i]) * x[i] * sums[i],)
        _store(tensors.dx, dx, place, shape, start, plan)
        if tensors.dresidual is not None:
            _store(tensors.dresidual, g[:STEP], place, shape, start, plan)
