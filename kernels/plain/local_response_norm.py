"""Local response normalization (Krizhevsky, Sutskever and Hinton 2012, section 3.3) across channels:

    y_c = x_c d_c^-beta,   d_c = k + alpha / n sum of x_j^2 over the n channels j from c - n // 2 to c + (n - 1) // 2
    dx_c = dy_c d_c^-beta - 2 alpha beta / n x_c s_c
    s_c = sum of dy_j x_j d_j^(-beta - 1) over j from c - (n - 1) // 2 to c + n // 2

The tuned twin is ``kernels/local_response_norm.py``.
"""

import triton
import triton.language as tl


@triton.jit
def _channel(x_ptr, channel, channels, inner, BLOCK: tl.constexpr):
    """A channel of this program's sample: zeros where the tensor has none."""
    column = tl.arange(0, BLOCK)
    sample = tl.program_id(0).to(tl.int64) // channels
    inside = column < tl.where((channel >= 0) & (channel < channels), inner, 0)
    return tl.load(x_ptr + (sample * channels + channel) * inner + column, mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _divisor(x_ptr, channel, channels, inner, alpha, k, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(SIZE):
        x = _channel(x_ptr, channel - SIZE // 2 + j, channels, inner, BLOCK)
        total += x * x
    return k + alpha / SIZE * total


@triton.jit
def forward(x_ptr, y_ptr, channels, inner, alpha: tl.float32, beta: tl.float32, k: tl.float32,
            SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x, y [samples, channels, inner]. Grid: (samples * channels,)."""
    channel = tl.program_id(0) % channels
    x = _channel(x_ptr, channel, channels, inner, BLOCK)
    y = x * tl.exp(-beta * tl.log(_divisor(x_ptr, channel, channels, inner, alpha, k, SIZE, BLOCK)))
    column = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * inner + column, y, mask=column < inner)


@triton.jit
def backward(x_ptr, dy_ptr, dx_ptr, channels, inner, alpha: tl.float32, beta: tl.float32, k: tl.float32,
             SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The divisors of the window's channels are computed again. Grid: (samples * channels,)."""
    channel = tl.program_id(0) % channels
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(SIZE):
        other = channel - (SIZE - 1) // 2 + j
        d = _divisor(x_ptr, other, channels, inner, alpha, k, SIZE, BLOCK)
        product = _channel(x_ptr, other, channels, inner, BLOCK) * _channel(
            dy_ptr, other, channels, inner, BLOCK
        )
        total += product * tl.exp((-beta - 1) * tl.log(d))
    x, dy = (
        _channel(x_ptr, channel, channels, inner, BLOCK),
        _channel(dy_ptr, channel, channels, inner, BLOCK),
    )
    power = tl.exp(-beta * tl.log(_divisor(x_ptr, channel, channels, inner, alpha, k, SIZE, BLOCK)))
    column = tl.arange(0, BLOCK)
    dx = dy * power - 2 * alpha * beta / SIZE * x * total
    tl.store(dx_ptr + tl.program_id(0).to(tl.int64) * inner + column, dx, mask=column < inner)
