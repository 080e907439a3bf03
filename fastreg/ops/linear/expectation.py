"""E f(u) of normal u with a given mean and standard deviation, element by element, for an activation f.

In closed form where there is one (``CLOSED_FORMS``), else a weighted sum over values of u: by the trapezoidal rule, or
over draws. That is one launch of ``kernels/expectation.py`` (CUDA), or a loop in ATen over the same values.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.fused import activated
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div
from fastreg.ops.linear.checks import on_kernels
from fastreg.ops.operator import apply, by_definition, keep, kept, needs_definition, operator
from fastreg.random import DRAWS, Stream

if backend.HAS_TRITON:
    from fastreg.kernels import expectation as kernels


# --- closed forms -----------------------------------------------------------------------------------------


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _relu(mean: Tensor, deviation: Tensor) -> Tensor:
    ratio = mean / deviation
    return mean * torch.special.ndtr(ratio) + deviation * _density(ratio)


def _leaky_relu(mean: Tensor, deviation: Tensor) -> Tensor:
    return 0.01 * mean + 0.99 * _relu(mean, deviation)


def _gelu(mean: Tensor, deviation: Tensor) -> Tensor:
    """E u Phi(u), by Stein's lemma mean E Phi(u) + variance E phi(u)."""
    wider = (1 + deviation.square()).sqrt()
    ratio = mean / wider
    return mean * torch.special.ndtr(ratio) + deviation.square() / wider * _density(ratio)


def _elu(mean: Tensor, deviation: Tensor) -> Tensor:
    """relu, and e^u - 1 below zero: e^(mean + variance / 2) Phi(-ratio - deviation) - Phi(-ratio)."""
    ratio = mean / deviation
    # In logarithms: the exponential overflows where the tail behind it is 0.
    exponential = torch.exp(mean + 0.5 * deviation.square() + torch.special.log_ndtr(-ratio - deviation))
    return _relu(mean, deviation) + exponential - torch.special.ndtr(-ratio)


def _hardswish(mean: Tensor, deviation: Tensor) -> Tensor:
    """u above 3 and u (u + 3) / 6 between -3 and 3, from the moments of a normal between bounds."""
    low, high = (-3 - mean) / deviation, (3 - mean) / deviation
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    first = mean * inside + deviation * (_density(low) - _density(high))
    second = (mean.square() + deviation.square()) * inside
    second = second + deviation * ((mean - 3) * _density(low) - (mean + 3) * _density(high))
    above = mean * torch.special.ndtr(-high) + deviation * _density(high)
    return above + (second + 3 * first) / 6


def _relu6(mean: Tensor, deviation: Tensor) -> Tensor:
    return _relu(mean, deviation) - _relu(mean - 6, deviation)


def _hardsigmoid(mean: Tensor, deviation: Tensor) -> Tensor:
    return _relu6(mean + 3, deviation) / 6


CLOSED_FORMS = {
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "elu": _elu,
    "hardswish": _hardswish,
    "relu6": _relu6,
    "hardsigmoid": _hardsigmoid,
}
"""The exact expectation of an activation, for deviations that are not 0."""


def closed_form(mean: Tensor, deviation: Tensor, activation: str) -> Tensor:
    certain = deviation == 0
    expected = CLOSED_FORMS[activation](mean, torch.where(certain, 1.0, deviation))
    return torch.where(certain, activated(mean, activation), expected)


def probit_sigmoid(mean: Tensor, deviation: Tensor) -> Tensor:
    """Approximately E sigmoid(u), which has no closed form: that of Phi(sqrt(pi / 8) u), of the same slope at 0, has.

    Off by less than 0.02 anywhere. Source: MacKay 1992 (Neural Computation 4, "The Evidence Framework Applied to
    Classification Networks").
    """
    return torch.sigmoid(mean / (1 + math.pi / 8 * deviation.square()).sqrt())


# --- as a weighted sum ------------------------------------------------------------------------------------

NODES, REACH = 48, 5.5
"""The trapezoidal rule takes so many nodes, over so many deviations to each side."""


def nodes() -> list[tuple[float, float]]:
    """Standard normal values and their weights, which sum to 1.

    Errors of E f(u) are at most 2e-6 where u has a deviation up to 3, 3e-4 up to 5, 8e-3 up to 10 (tanh, the worst).
    From there on they grow to those of 1,000 draws. As many nodes of Gauss and Hermite are further apart in the middle,
    and off by ten times as much.

    Source: Trefethen and Weideman 2014, "The Exponentially Convergent Trapezoidal Rule" (SIAM Review 56).
    """
    values = [(2 * i / (NODES - 1) - 1) * REACH for i in range(NODES)]
    weights = [math.exp(-0.5 * value**2) for value in values]
    return [(value, weight / sum(weights)) for value, weight in zip(values, weights, strict=True)]


def _definition(
    mean: Tensor, deviation: Tensor, stream: Stream | None, activation: str, samples: int
) -> Tensor:
    """samples: how many draws, without a stream by torch's normals, which a CPU makes faster; 0: the nodes."""
    total = torch.zeros_like(deviation)
    for eps, weight in nodes() if samples == 0 else ():
        v = torch.add(mean, deviation, alpha=eps)
        total = torch.add(total, activated(v, activation), alpha=weight)
    for first in range(0, samples, DRAWS):
        if stream is None:
            draws = torch.randn(*mean.shape, DRAWS, dtype=deviation.dtype, device=mean.device)
        else:
            draws = random.draws(
                mean.shape, first // DRAWS, stream, dtype=deviation.dtype, device=mean.device
            )
        v = mean.unsqueeze(-1) + deviation.unsqueeze(-1) * draws[..., : samples - first]
        total = total + activated(v, activation).sum(-1) / samples
    return total


def _launch(kernels_: tuple, tensors: Any, stream: Stream, activation: str, samples: int) -> Launch:
    """kernels_: by nodes, and by draws."""
    elements = tensors.mean.numel()
    block = (
        128  # an element a thread: memory does not matter, and a small layer still has programs to fill a GPU
    )
    plan = kernels.Plan(activation, block, wide=elements >= 1 << 31, tail=samples % DRAWS)
    arguments = {"tensors": tensors, "elements": elements, "plan": plan, "num_warps": 4}
    if samples:
        draws = {"offset": stream.offset, "quads": samples // DRAWS}
        arguments |= number("seed", stream.seed, 0) | draws
    else:
        arguments |= {"NODES": kernels.NODES}
    return Launch(kernels_[samples > 0], (ceil_div(elements, block),), arguments)


@planned
def average_launches(
    mean: Tensor, deviation: Tensor, y: Tensor, stream: Stream, activation: str, samples: int
) -> list[Launch]:
    """All contiguous, of one shape."""
    both = kernels.integrate, kernels.average
    return [_launch(both, kernels.Forward(mean, deviation, y), stream, activation, samples)]


@planned
def gradient_launches(
    dy: Tensor,
    mean: Tensor,
    deviation: Tensor,
    dmean: Tensor,
    ddeviation: Tensor,
    stream: Stream,
    activation: str,
    samples: int,
) -> list[Launch]:
    both = kernels.integrate_backward, kernels.average_backward
    tensors = kernels.Backward(dy, mean, deviation, dmean, ddeviation)
    return [_launch(both, tensors, stream, activation, samples)]


@operator("fastreg::expected_activation", writes=["y"])
def _forward(
    mean: Tensor, deviation: Tensor, y: Tensor, stream: Stream, activation: str, samples: int
) -> None:
    """y: contiguous."""
    if y.numel():
        average_launches.run(mean.contiguous(), deviation.contiguous(), y, stream, activation, samples)


@operator("fastreg::expected_activation_backward", writes=["dmean", "ddeviation"])
def _backward(
    dy: Tensor,
    mean: Tensor,
    deviation: Tensor,
    dmean: Tensor,
    ddeviation: Tensor,
    stream: Stream,
    activation: str,
    samples: int,
) -> None:
    """dmean, ddeviation: contiguous."""
    if dy.numel():
        given = dy.contiguous(), mean.contiguous(), deviation.contiguous()
        gradient_launches.run(*given, dmean, ddeviation, stream, activation, samples)


class _Average(torch.autograd.Function):
    """Saves mean, deviation and the stream, and no draw."""

    @staticmethod
    def forward(ctx, mean, deviation, seed, offset, activation, samples):
        stream = Stream(seed, offset)
        y = torch.empty_like(deviation, memory_format=torch.contiguous_format)
        _forward(mean, deviation, y, stream, activation, samples)
        ctx.options = activation, samples
        keep(ctx, stream, mean, deviation)
        return y

    @staticmethod
    def backward(ctx, dy):
        stream, *inputs = kept(ctx)
        if needs_definition(dy):
            activation, samples = ctx.options
            definition = partial(_definition, stream=stream, activation=activation, samples=samples)
            found = by_definition(definition, inputs, dy)
        else:
            found = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
            _backward(dy, *inputs, *found, stream, *ctx.options)
        return *found, None, None, None, None


def average(
    mean: Tensor, deviation: Tensor, activation: str, samples: int = 0, seed=None, generator=None
) -> Tensor:
    """The average of ``activation`` over a normal with this mean and deviation, in the dtype of ``deviation``.

    mean, deviation: floating point, one shape.
    samples: over so many draws; 0: by the trapezoidal rule, which draws nothing.
    seed, generator: as in :func:`fastreg.functional.dropout`; with them, and on the kernels, draw d of element i is
        that of ``fastreg.random.draws``.
    """
    ours = on_kernels(mean, deviation)
    drawn = samples > 0 and (ours or random.is_wanted(seed, generator))
    stream = random.stream(mean.device, seed, generator) if drawn else None
    if not ours:
        return _definition(mean, deviation, stream, activation, samples)
    return apply(_Average, mean, deviation, *(stream or Stream(0)), activation, samples)
