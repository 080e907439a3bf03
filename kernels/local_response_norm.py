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
"""

import triton
import triton.language as tl

from . import activation
from .fastmath import exp2, log2, reciprocal, sqrt, upcast


@triton.jit
def _index(number, WIDE: tl.constexpr):
    """A number in the type of element indices: 64 bits only where the tensor needs them."""
    return number.to(tl.int64) if WIDE else number


@triton.jit
def _constant(number, like):
    """A number that came as fp64 in the dtype that is computed in."""
    return tl.full([1], number, like.dtype)


@triton.jit
def _place(samples, channels, inner_vectors, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
           VECTOR: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Where a program's block is: its first channel, the element index of that, and which rows are in the tensor.

    Each has a value for each of ROWS rows [ROWS, 1]; where not LAST, the first channel is one for all [1, 1]. A row is
    VECTOR positions or, where LAST, the CHANNELS channels of one position.
    """
    row = tl.arange(0, ROWS)[:, None]
    blocks = tl.cdiv(channels, CHANNELS)
    if LAST:
        block = _index(tl.program_id(0), WIDE) * ROWS + row
        position = block // blocks
        channel = (block - position * blocks) * CHANNELS
        return channel, position * channels + channel, position < samples
    else:
        tile = tl.program_id(0) // blocks
        channel = (tl.program_id(0) - tile * blocks) * CHANNELS
        vector = _index(tile, WIDE) * ROWS + row
        sample = vector // inner_vectors
        first = (sample * (channels - 1) + channel) * inner_vectors + vector
        # As a tensor: the interpreter makes integers of a tensor & a number.
        return tl.full([1, 1], channel, tl.int32), first * VECTOR, sample < samples


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
def _row(
    x_ptr, place, shape, START: tl.constexpr, STOP: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr
):
    """What ``_take`` takes from where LAST: the channels from START to STOP, which it rounds to whole vectors."""
    channel, first, inside = place
    channels, _ = shape
    found = ()
    for i in tl.static_range(START // VECTOR * VECTOR, STOP, VECTOR):
        wanted = inside & (channel + i >= 0) & (channel + i < channels)
        x = tl.load(x_ptr + (first + i) + tl.arange(0, VECTOR)[None, :], mask=wanted, other=0.0)
        found += _unpacked(upcast(x), ROWS, VECTOR)
    return found[START % VECTOR : START % VECTOR + STOP - START]


@triton.jit
def _take(source, place, shape, FIRST: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr,
          VECTOR: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """The channels from START to STOP, counted from the block's first, a tensor each; 0 outside the tensor.

    source: a tensor's pointer; where LAST the ``_row`` that begins with channel FIRST.
    """
    if LAST:
        return source[START - FIRST : STOP - FIRST]
    else:
        channel, first, inside = place
        channels, inner = shape
        found = ()
        for i in tl.static_range(START, STOP):
            wanted = inside & (channel + i >= 0) & (channel + i < channels)
            x = tl.load(source + i * inner + (first + tl.arange(0, VECTOR)[None, :]), mask=wanted, other=0.0)
            found += (upcast(x),)
        return found


@triton.jit
def _store(y_ptr, values, place, shape, START: tl.constexpr,
           ROWS: tl.constexpr, VECTOR: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """The block's channels from START."""
    channel, first, inside = place
    channels, inner = shape
    lane = tl.arange(0, VECTOR)[None, :]
    if LAST:
        for i in tl.static_range(0, len(values), VECTOR):
            y = _packed(values[i : i + VECTOR], ROWS, VECTOR).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + (first + START + i) + lane, y, mask=inside & (channel + START + i < channels))
    else:
        for i in tl.static_range(len(values)):
            y = values[i].to(y_ptr.dtype.element_ty)
            wanted = inside & (channel + START + i < channels)
            tl.store(y_ptr + (START + i) * inner + (first + lane), y, mask=wanted)


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
def _denominators(x, scale, k, SIZE: tl.constexpr):
    """k + scale (sum of x^2) of every whole window."""
    squares = ()
    for i in tl.static_range(len(x)):
        squares += (x[i] * x[i],)
    sums = _window_sums(squares, SIZE)
    found = ()
    for i in tl.static_range(len(sums)):
        found += (sums[i] * _constant(scale, x[0]) + _constant(k, x[0]),)
    return found


@triton.jit
def _power(d, beta, THREE_QUARTERS: tl.constexpr):
    """d^-beta and 1/d."""
    if THREE_QUARTERS:
        root = tl.rsqrt(d)
        return root * sqrt(root), root * root
    else:
        return exp2(log2(d) * _constant(-beta, d)), reciprocal(d)


@triton.jit
def forward(
    x_ptr,  # fp64, fp32, fp16 or bf16 [samples, channels, inner]: a dense tensor in memory order
    residual_ptr,  # any of those [samples, channels, inner], or None
    y_ptr,  # any of those [samples, channels, inner]
    scale: tl.float64,  # alpha/n
    beta: tl.float64,
    k: tl.float64,  # > 0, as scale is, so that d is
    samples,
    channel_vectors,  # LAST: channels / VECTOR; else channels
    inner_vectors,  # LAST: 1; else inner / VECTOR
    BEFORE: tl.constexpr,  # channels of a window before its own ...
    AFTER: tl.constexpr,  # ... and behind it, at most channels - 1 each
    THREE_QUARTERS: tl.constexpr,  # beta is 3/4
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a block; LAST: a multiple of VECTOR
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,  # channels are innermost in memory
    WIDE: tl.constexpr,  # 64-bit indices, for 2^31 elements and more
):
    """One block of CHANNELS channels and ROWS rows a program; grid: (channel blocks x row blocks,)."""
    # Written as products, so that the compiler sees that vectors are aligned, and inside as a whole or not at all.
    channels = channel_vectors * VECTOR if LAST else channel_vectors
    inner = 1 if LAST else _index(inner_vectors, WIDE) * VECTOR
    shape = (channels, inner)
    place = _place(samples, channels, inner_vectors, CHANNELS, ROWS, VECTOR, LAST, WIDE)
    REACH: tl.constexpr = BEFORE + AFTER
    STEP: tl.constexpr = VECTOR if LAST else 1
    x_source, residual_source = x_ptr, residual_ptr
    if LAST:
        x_source = _row(x_ptr, place, shape, -BEFORE, CHANNELS + AFTER, ROWS, VECTOR)
        if residual_ptr is not None:
            residual_source = _row(residual_ptr, place, shape, 0, CHANNELS, ROWS, VECTOR)
    x = _take(x_source, place, shape, -BEFORE, -BEFORE, AFTER, VECTOR, LAST)
    for start in tl.static_range(0, CHANNELS, STEP):
        # The channels of STEP whole windows: of the last step's, what these reach back to, and STEP new ones.
        x = x[len(x) - REACH :] + _take(
            x_source, place, shape, -BEFORE, start + AFTER, start + AFTER + STEP, VECTOR, LAST
        )
        if residual_ptr is not None:
            residual = _take(residual_source, place, shape, 0, start, start + STEP, VECTOR, LAST)
        d = _denominators(x, scale, k, REACH + 1)
        y = ()
        for i in tl.static_range(STEP):
            power, _ = _power(d[i], beta, THREE_QUARTERS)
            v = x[BEFORE + i] * power
            if residual_ptr is not None:
                v += residual[i].to(v.dtype)
            y += (activation.forward(v, ACTIVATION, x_ptr.dtype.element_ty),)
        _store(y_ptr, y, place, shape, start, ROWS, VECTOR, LAST)


@triton.jit
def _gradients(
    x, dy, residual, scale, beta, k,
    BEFORE: tl.constexpr, SIZE: tl.constexpr, THREE_QUARTERS: tl.constexpr,
    ACTIVATION: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Of every channel whose whole window is in ``x``: g, g d^-beta and g x d^(-beta-1)."""
    d = _denominators(x, scale, k, SIZE)
    gs, direct, through_d = (), (), ()
    for i in tl.static_range(len(d)):
        power, inverse = _power(d[i], beta, THREE_QUARTERS)
        v = x[BEFORE + i] * power
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
    dy_ptr,  # fp64, fp32, fp16 or bf16 [samples, channels, inner], laid out as forward's x
    x_ptr,  # forward's x
    residual_ptr,  # forward's residual, or None where there is none or f is the identity
    dx_ptr,  # any of those [samples, channels, inner]
    dresidual_ptr,  # any of those [samples, channels, inner], or None where it is not needed or equals dy
    scale: tl.float64,
    beta: tl.float64,
    k: tl.float64,
    samples,
    channel_vectors,
    inner_vectors,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Arguments and grid as in ``forward``."""
    channels = channel_vectors * VECTOR if LAST else channel_vectors
    inner = 1 if LAST else _index(inner_vectors, WIDE) * VECTOR
    shape = (channels, inner)
    place = _place(samples, channels, inner_vectors, CHANNELS, ROWS, VECTOR, LAST, WIDE)
    REACH: tl.constexpr = BEFORE + AFTER
    STEP: tl.constexpr = VECTOR if LAST else 1
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    x_source, dy_source, residual_source = x_ptr, dy_ptr, residual_ptr
    if LAST:
        x_source = _row(x_ptr, place, shape, -REACH, CHANNELS + REACH, ROWS, VECTOR)
        dy_source = _row(dy_ptr, place, shape, -AFTER, CHANNELS + BEFORE, ROWS, VECTOR)
        if residual_ptr is not None:
            residual_source = _row(residual_ptr, place, shape, -AFTER, CHANNELS + BEFORE, ROWS, VECTOR)

    # Channel c is in the windows of the channels from c - AFTER to c + BEFORE, and these reach as far again.
    x = _take(x_source, place, shape, -REACH, -REACH, REACH, VECTOR, LAST)
    dy = _take(dy_source, place, shape, -AFTER, -AFTER, BEFORE, VECTOR, LAST)
    residual = None
    if residual_ptr is not None:
        residual = _take(residual_source, place, shape, -AFTER, -AFTER, BEFORE, VECTOR, LAST)
    g, direct, through_d = _gradients(
        x, dy, residual, scale, beta, k, BEFORE, REACH + 1, THREE_QUARTERS, ACTIVATION, STORED
    )
    for start in tl.static_range(0, CHANNELS, STEP):
        x = x[len(x) - REACH :] + _take(
            x_source, place, shape, -REACH, start + REACH, start + REACH + STEP, VECTOR, LAST
        )
        dy = _take(dy_source, place, shape, -AFTER, start + BEFORE, start + BEFORE + STEP, VECTOR, LAST)
        if residual_ptr is not None:
            residual = _take(
                residual_source, place, shape, -AFTER, start + BEFORE, start + BEFORE + STEP, VECTOR, LAST
            )
        new_g, new_direct, new_through_d = _gradients(
            x, dy, residual, scale, beta, k, BEFORE, REACH + 1, THREE_QUARTERS, ACTIVATION, STORED
        )
        g = g[len(g) - BEFORE :] + new_g
        direct = direct[len(direct) - BEFORE :] + new_direct
        through_d = through_d[len(through_d) - REACH :] + new_through_d
        sums = _window_sums(through_d, REACH + 1)
        dx = ()
        for i in tl.static_range(STEP):
            dx += (direct[i] + _constant(-2.0 * scale * beta, x[i]) * x[i] * sums[i],)
        _store(dx_ptr, dx, place, shape, start, ROWS, VECTOR, LAST)
        if dresidual_ptr is not None:
            _store(dresidual_ptr, g[:STEP], place, shape, start, ROWS, VECTOR, LAST)
