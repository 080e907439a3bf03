"""Activations and their derivatives, for fusion into any kernel that already holds the value in a register.

``forward(v, NAME, STORED)`` is f(v); ``backward(g, v, NAME, STORED)`` is g f'(v), and under the name
"tanh_of_output" and its like g f'(v) from f(v) in the place of v. ``v`` is fp32 (fp64 for fp64 tensors); parameters
are torch's defaults (leaky_relu 0.01, elu 1), and 1.702 for quick_gelu. STORED is the dtype v was loaded from: terms
far below its rounding are left out.

Cost: a bf16 forward that reads and writes one tensor has about 38 issue slots an element before arithmetic,
not memory, sets its time, and dropout takes 13 of them; so each function is written for the fewest
instructions and at most two special-function results (8 slots each) an element.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .fastmath import add, exp2, fma, mul, negated, reciprocal

LOG2_E = tl.constexpr(1.4426950408889634)
# gelu_tanh is v sigmoid(2u), u = sqrt(2/pi) (v + 0.044715 v^3), and exp(-2u) is exp2(v (C1 + C3 v^2)).
TANH_GELU_C1 = tl.constexpr(-2.302208198144325)
TANH_GELU_C3 = tl.constexpr(-0.1029432395800235)


@triton.jit
def _exp(v):
    return exp2(v * LOG2_E)


@triton.jit
def _sigmoid(v):
    return reciprocal(add(exp2(mul(v, -LOG2_E)), 1.0))


@triton.jit
def _quick_gelu_gate(v):
    """sigmoid(1.702 v)"""
    return reciprocal(add(exp2(mul(v, -1.702 * LOG2_E)), 1.0))


@triton.jit
def _normal_tail(v, STORED: tl.constexpr):
    """Phi(-|v|), the upper tail of the standard normal.

    Its logarithm is smooth: log2 Phi(-a) = -1 + a P(a), with P a minimax polynomial on [0, 5.5] that keeps the
    tail below 1e-25 up to a = 16, where a is cut. So one exp2 gives the tail with a RELATIVE error of 3e-6 (fp32),
    2e-5 (fp16) or 3e-4 (bf16, a seventh of its rounding) down to v = -5, where 1 - erf cancels: torch's fp32
    gelu(-5) has lost a fifth of its value.
    """
    a = tl.minimum(tl.abs(v), 16.0)
    if STORED.primitive_bitwidth > 16:
        p = fma(a, -1.87017601e-08, 5.88439832e-07)
        p = fma(a, p, -7.94592597e-06)
        p = fma(a, p, 5.80986816e-05)
        p = fma(a, p, -0.000213728476)
        p = fma(a, p, -0.000142537043)
        p = fma(a, p, 0.00712780515)
        p = fma(a, p, -0.052566722)
        p = fma(a, p, -0.459180146)
        p = fma(a, p, -1.15110838)
    elif STORED == tl.float16:
        p = fma(a, 2.97347833e-05, -0.00071335031)
        p = fma(a, p, 0.00777515676)
        p = fma(a, p, -0.0526961721)
        p = fma(a, p, -0.459489226)
        p = fma(a, p, -1.15095747)
    else:
        p = fma(a, -0.00024119651, 0.00498826755)
        p = fma(a, p, -0.0452387556)
        p = fma(a, p, -0.468181193)
        p = fma(a, p, -1.14767551)
    return a, exp2(fma(a, p, -1.0))


@triton.jit
def _relu(v):
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(v, STORED: tl.constexpr):
    if v.dtype == tl.float64:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    else:
        a, tail = _normal_tail(v, STORED)
        return fma(a, negated(tail), _relu(v))


@triton.jit
def _gelu_backward(g, v, STORED: tl.constexpr):
    density = exp2(fma(mul(v, v), -0.5 * LOG2_E, -1.3257480647361593))  # log2 sqrt(2 pi)
    if v.dtype == tl.float64:
        cumulative = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
    else:
        tail = _normal_tail(v, STORED)[1]
        cumulative = tl.where(v > 0, 1.0 - tail, tail)
    return mul(g, fma(v, density, cumulative))


@triton.jit
def _gelu_tanh_gate(v):
    """sigmoid(2u): the factor of v in the tanh form of gelu."""
    return reciprocal(1.0 + exp2(v * (TANH_GELU_C1 + TANH_GELU_C3 * v * v)))


@triton.jit
def _tanh(v, STORED: tl.constexpr):
    # 1 - 2 / (1 + e^2v) is good to 1e-7 absolute: near 0, where that is not enough, tanh is its series.
    far = 1.0 - 2.0 * reciprocal(1.0 + exp2(v * (2.0 * LOG2_E)))
    if STORED.primitive_bitwidth > 16:
        s = v * v
        near = v + v * s * (-0.3333333333333333 + s * (0.13333333333333333 + s * -0.05396825396825397))
        return tl.where(tl.abs(v) < (2.0**-6 if v.dtype == tl.float64 else 0.2), near, far)
    else:
        return tl.where(tl.abs(v) < 0.01, v, far)


@triton.jit
def _expm1_negative(v, STORED: tl.constexpr):
    """e^v - 1 for v <= 0."""
    far = _exp(v) - 1.0
    if STORED.primitive_bitwidth > 16:
        near = v + v * v * (
            0.5 + v * (0.16666666666666666 + v * (0.041666666666666664 + v * 0.008333333333333333))
        )
        return tl.where(v > (-(2.0**-9) if v.dtype == tl.float64 else -0.1), near, far)
    else:
        return tl.where(v > -0.02, v + 0.5 * v * v, far)


class Mish(NamedTuple):
    w: tl.tensor
    e: tl.tensor
    n: tl.tensor
    r: tl.tensor


@triton.jit
def _mish_terms(v):
    """w = min(v, 20), e^w, n = e^w (e^w + 2) and r = 1 / (n + 2): tanh(softplus(v)) = n r, 1 already at v = 20."""
    w = tl.minimum(v, 20.0, propagate_nan=tl.PropagateNan.ALL)
    e = _exp(w)
    n = e * (e + 2.0)
    return Mish(w, e, n, reciprocal(n + 2.0))


@triton.jit
def forward(v, NAME: tl.constexpr, STORED: tl.constexpr):
    if NAME == "relu":
        return _relu(v)
    elif NAME == "leaky_relu":
        return tl.where(v > 0, v, 0.01 * v)
    elif NAME == "gelu":
        return _gelu(v, STORED)
    elif NAME == "gelu_tanh":
        return v * _gelu_tanh_gate(v)
    elif NAME == "silu":
        return mul(v, _sigmoid(v))
    elif NAME == "sigmoid":
        return _sigmoid(v)
    elif NAME == "tanh":
        return _tanh(v, STORED)
    elif NAME == "elu":
        return tl.where(v > 0, v, _expm1_negative(v, STORED))
    elif NAME == "mish":
        mish = _mish_terms(v)
        return v * (mish.n * mish.r)
    elif NAME == "hardswish":
        return v * (tl.minimum(tl.maximum(v + 3.0, 0.0), 6.0) * 0.16666666666666666)
    elif NAME == "relu6":
        return tl.minimum(_relu(v), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "hardsigmoid":
        w = tl.maximum(v + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(w, 6.0, propagate_nan=tl.PropagateNan.ALL) * 0.16666666666666666
    elif NAME == "quick_gelu":
        return mul(v, _quick_gelu_gate(v))
    else:
        tl.static_assert(NAME is None, "unknown activation")
        return v


@triton.jit
def backward(g, v, NAME: tl.constexpr, STORED: tl.constexpr):
    if NAME == "relu" or NAME == "relu_of_output":
        return tl.where(v <= 0, 0.0, g)
    elif NAME == "leaky_relu" or NAME == "leaky_relu_of_output":
        return tl.where(v > 0, g, 0.01 * g)
    elif NAME == "sigmoid_of_output":
        return g * v * (1.0 - v)
    elif NAME == "tanh_of_output":
        return g * (1.0 - v * v)
    elif NAME == "elu_of_output":
        return tl.where(v > 0, g, g * (v + 1.0))
    elif NAME == "gelu":
        return _gelu_backward(g, v, STORED)
    elif NAME == "gelu_tanh":
        s = _gelu_tanh_gate(v)
        slope = v * (TANH_GELU_C1 + 3.0 * TANH_GELU_C3 * v * v)  # -2 v u'(v) log2(e)
        return g * s * (1.0 - (1.0 - s) * slope * 0.6931471805599453)
    elif NAME == "silu":
        s = _sigmoid(v)
        return mul(g, fma(s, fma(negated(v), s, v), s))  # s (1 + v (1 - s))
    elif NAME == "sigmoid":
        s = _sigmoid(v)
        return g * s * (1.0 - s)
    elif NAME == "tanh":
        t = _tanh(v, STORED)
        return g * (1.0 - t * t)
    elif NAME == "elu":
        return tl.where(v > 0, g, g * _exp(v))
    elif NAME == "mish":
        m = _mish_terms(v)
        # w and not v, with which the term would grow again behind 20.
        return g * m.r * (m.n + m.w * (4.0 * (m.e * (m.e + 1.0)) * m.r))
    elif NAME == "hardswish":
        return tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, g, g * (v * 0.3333333333333333 + 0.5)))
    elif NAME == "relu6" or NAME == "relu6_of_output":
        return tl.where((v <= 0.0) | (v >= 6.0), 0.0, g)
    elif NAME == "hardsigmoid":
        return tl.where((v <= -3.0) | (v >= 3.0), 0.0, g * 0.16666666666666666)
    elif NAME == "quick_gelu":
        s = _quick_gelu_gate(v)
        # s (1 + 1.702 v (1 - s)). 1.702 v may overflow, and s is 0 there.
        return mul(g, fma(mul(s, 1.702), fma(negated(s), v, v), s))
    else:
        tl.static_assert(NAME is None, "unknown activation")
        return g
