"""E f(u) of normal u with a given mean and standard deviation, element by element, for an activation f.

In closed form where there is one (``CLOSED_FORMS``), else a weighted sum over values of u: by the trapezoidal rule, or
over draws. That is one launch of ``kernels/expectation.py`` (CUDA), or a loop in ATen over the same values.
"""

import math

import torch
from torch import Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.fused import activated
from fastreg.ops.layout import ceil_div
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


CLOSED_FORMS = {
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "elu": _elu,
    "hardswish": _hardswish,
}
"""Activations whose expectation is exact. Of a deviation that is not 0."""


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
"""Of the trapezoidal rule: so many nodes, over so many deviations to each side."""


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
            eps = torch.randn(*mean.shape, DRAWS, dtype=deviation.dtype, device=mean.device)
        else:
            eps = random.draws(mean.shape, first // DRAWS, stream, dtype=deviation.dtype, device=mean.device)
        eps = eps[..., : samples - first]
        v = mean.unsqueeze(-1) + deviation.unsqueeze(-1) * eps
        total = total + activated(v, activation).sum(-1) / samples
    return total


def _launch(
    kernels_: tuple, mean: Tensor, tensors: dict, stream: Stream, activation: str, samples: int
) -> Launch:
    """kernels_: by nodes, and by draws."""
    elements = mean.numel()
    block = 128  # an element a thread: bytes hardly count, and a small layer has programs to fill a GPU too
    arguments = tensors | {
        "elements": elements,
        "ACTIVATION": activation,
        "BLOCK": block,
        "WIDE": elements >= 1 << 31,
        "num_warps": 4,
    }
    if samples:
        draws = {"offset": stream.offset, "quads": samples // DRAWS, "TAIL": samples % DRAWS}
        arguments |= number("seed", stream.seed, 0) | draws
    else:
        arguments |= {"NODES": kernels.NODES}
    return Launch(kernels_[samples > 0], (ceil_div(elements, block),), arguments)


def average_launch(
    mean: Tensor, deviation: Tensor, y: Tensor, stream: Stream, activation: str, samples: int
) -> Launch:
    """All contiguous, of one shape."""
    tensors = {"mean_ptr": mean, "deviation_ptr": deviation, "y_ptr": y}
    return _launch((kernels.integrate, kernels.average), mean, tensors, stream, activation, samples)


def gradient_launch(dy, mean, deviation, dmean, ddeviation, stream, activation: str, samples: int) -> Launch:
    tensors = {"dy_ptr": dy, "mean_ptr": mean, "deviation_ptr": deviation}
    tensors |= {"dmean_ptr": dmean, "ddeviation_ptr": ddeviation}
    both = kernels.integrate_backward, kernels.average_backward
    return _launch(both, mean, tensors, stream, activation, samples)


@torch.library.custom_op("fastreg::expected_activation", mutates_args=())
def _average_op(
    mean: Tensor, deviation: Tensor, seed: Tensor, offset: int, activation: str, samples: int
) -> Tensor:
    return _average(mean, deviation, Stream(seed, offset), activation, samples)


@_average_op.register_fake
def _(mean, deviation, seed, offset, activation, samples):
    return deviation.new_empty(deviation.shape)


@torch.library.custom_op("fastreg::expected_activation_backward", mutates_args=())
def _gradient_op(
    dy: Tensor,
    mean: Tensor,
    deviation: Tensor,
    seed: Tensor,
    offset: int,
    activation: str,
    samples: int,
) -> tuple[Tensor, Tensor]:
    return _gradient(dy, mean, deviation, Stream(seed, offset), activation, samples)


@_gradient_op.register_fake
def _(dy, mean, deviation, seed, offset, activation, samples):
    return mean.new_empty(mean.shape), deviation.new_empty(deviation.shape)


def _save(ctx, inputs, output):
    mean, deviation, seed, *ctx.rest = inputs
    ctx.save_for_backward(mean, deviation, seed)


def _compiled_backward(ctx, dy):
    return (*_gradient_op(dy, *ctx.saved_tensors, *ctx.rest), None, None, None, None)


_average_op.register_autograd(_compiled_backward, setup_context=_save)


def _average(mean, deviation, stream: Stream, activation: str, samples: int) -> Tensor:
    mean, deviation = mean.contiguous(), deviation.contiguous()
    y = torch.empty_like(deviation)
    if y.numel():
        average_launch(mean, deviation, y, stream, activation, samples).run(y.device)
    return y


def _gradient(dy, mean, deviation, stream: Stream, activation: str, samples: int) -> tuple[Tensor, Tensor]:
    dy, mean, deviation = dy.contiguous(), mean.contiguous(), deviation.contiguous()
    results = torch.empty_like(mean), torch.empty_like(deviation)
    if dy.numel():
        gradient_launch(dy, mean, deviation, *results, stream, activation, samples).run(dy.device)
    return results


def _differentiable_gradient(dy, mean, deviation, stream, activation, samples) -> tuple[Tensor, Tensor]:
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (mean, deviation)]
        y = _definition(*inputs, stream, activation, samples)
        return torch.autograd.grad(y, inputs, dy, create_graph=create)


class _Average(torch.autograd.Function):
    """The eager path to the kernel. Saves mean, deviation and the stream, and no draw."""

    @staticmethod
    def forward(ctx, mean, deviation, seed, offset, activation, samples):
        in_memory = isinstance(seed, Tensor)
        ctx.seed, ctx.rest = None if in_memory else seed, (offset, activation, samples)
        ctx.save_for_backward(mean, deviation, seed if in_memory else None)
        return _average(mean, deviation, Stream(seed, offset), activation, samples)

    @staticmethod
    def backward(ctx, dy):
        mean, deviation, seed = ctx.saved_tensors
        offset, *rest = ctx.rest
        stream = Stream(ctx.seed if seed is None else seed, offset)
        run = _gradient
        if torch.is_grad_enabled() or not _on_kernels(dy, mean, deviation):
            run = _differentiable_gradient
        return (*run(dy, mean, deviation, stream, *rest), None, None, None, None)


def _on_kernels(*tensors: Tensor) -> bool:
    return all(backend.runs_kernels(t) and t.dtype != torch.float64 for t in tensors)


def average(
    mean: Tensor, deviation: Tensor, activation: str, samples: int = 0, seed=None, generator=None
) -> Tensor:
    """The average of ``activation`` over a normal with this mean and deviation, in the dtype of ``deviation``.

    mean, deviation: floating point, one shape.
    samples: over so many draws; 0: by the trapezoidal rule, which draws nothing.
    seed, generator: as in :func:`fastreg.functional.dropout`; with them, and on the kernels, draw d of element i is
        that of ``fastreg.random.draws``.
    """
    ours = _on_kernels(mean, deviation)
    drawn = samples > 0 and (ours or random.is_wanted(seed, generator))
    stream = random.stream(mean.device, seed, generator) if drawn else None
    if not ours:
        return _definition(mean, deviation, stream, activation, samples)
    stream = stream or Stream(0)
    if torch.compiler.is_compiling():
        return _average_op(mean, deviation, stream.seed_on(mean.device), stream.offset, activation, samples)
    return _Average.apply(mean, deviation, *stream, activation, samples)
