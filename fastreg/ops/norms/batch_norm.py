"""Batch normalization, fused with residual and activation: y = f(BN(x) + residual)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.arguments import is_number, plain
from fastreg.ops.checks import check_activation, check_residual
from fastreg.ops.fused import activated
from fastreg.ops.norms.channel_norm import (
    Form,
    Running,
    by_torch,
    normalize,
    plain_momentum,
    takes,
    update_running,
)

_Pair = tuple[Tensor | None, Tensor | None]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Normalizes each channel over the batch, then adds ``residual`` and applies ``activation``, in the same passes.

    .. math:: y = f\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta + r\right)

    Drop-in for :func:`torch.nn.functional.batch_norm`. In training the statistics are those of the batch, and the
    running ones are updated in place (with the unbiased variance); otherwise the running ones are used.

    Args:
        input: floating point ``[N, C, *]``, any strides. The result has its layout.
        running_mean, running_var: ``[C]``, or None in training.
        weight, bias: ``[C]``, or None. fp32 parameters go with 16-bit inputs.
        training: use and track the statistics of the batch.
        momentum: share of the batch in the running statistics. A tensor of one element stays on its device.
        eps: added to the variance.
        activation: a name of ``fastreg.functional.ACTIVATIONS``, with torch's default parameters.
        residual: added to what the operation itself gives: after the dropout, or before the activation of a norm. Shape
            of the input; the result has the promoted dtype of both.

    Raises:
        ValueError: one value per channel in training; eps that is not positive; unknown activation; a residual
            that does not fit. Else whatever torch raises.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """
    check_activation(activation)
    check_residual(input, residual)
    fused = activation is not None or residual is not None
    statistics = (running_mean, running_var)
    epsilon: Any = None
    part: Any = None
    if takes(input, weight, bias, statistics, 0, fused) and type(training) is bool:
        epsilon, part = plain(eps), plain_momentum(momentum, input)
    good = part is not None and is_number(epsilon) and epsilon > 0
    if not (good and (input.numel() > input.shape[1] if training else running_mean is not None)):
        y = _in_aten(input, statistics, weight, bias, training, momentum, eps)
        return activated(y, activation, residual)
    running = Running(*statistics, part) if training and running_mean is not None else None
    form = Form(0, epsilon, activation)
    return normalize(
        input, weight, bias, residual, None if training else statistics, running, form, input.dtype
    )


def _in_aten(input, statistics: _Pair, weight, bias, training, momentum: float | Tensor, eps) -> Tensor:
    if isinstance(momentum, Tensor) and plain_momentum(momentum, input) is momentum and training is True:
        return _with_momentum_in_memory(input, statistics, weight, bias, momentum, eps)
    return by_torch(F.batch_norm, input, *statistics, weight, bias, training, momentum, eps)


def _with_momentum_in_memory(input, statistics: _Pair, weight, bias, momentum: Tensor, eps) -> Tensor:
    known = momentum.device.type == "cpu" and type(momentum) in backend.PLAIN
    if known and not (torch.compiler.is_compiling() or backend.watched()):
        return by_torch(F.batch_norm, input, *statistics, weight, bias, True, momentum.item(), eps)
    # torch would ask for the number: it would wait for a GPU, and without data there is none.
    mean, var = (None if t is None else torch.zeros_like(t) for t in statistics)
    y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    update_running(Running(*statistics, momentum), mean, var)
    return y
