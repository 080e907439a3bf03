"""Group and instance normalization, fused with residual and activation: y = f(GN(x) + residual)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.ops.arguments import is_integer, is_number, plain
from fastreg.ops.checks import check_activation, check_residual
from fastreg.ops.fused import activated, autocast_dtype
from fastreg.ops.norms.channel_norm import Form, Running, by_torch, normalize, plain_momentum, takes


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalizes groups of channels of each sample, then adds ``residual`` and applies ``activation``.

    Drop-in for :func:`torch.nn.functional.group_norm`; under CUDA's autocast it returns fp32 as torch's does, but
    reads a 16-bit input as it is.

    Args:
        input: floating point ``[N, C, *]``, any strides. The result has its layout.
        num_groups: neighbouring channels share a group: it divides C.
        weight, bias: ``[C]``, or None. fp32 parameters go with 16-bit inputs.
        eps: added to the variance.
        activation: a name of ``fastreg.functional.ACTIVATIONS``, with torch's default parameters.
        residual: added to what the operation itself gives: after the dropout, or before the activation of a norm. Shape
            of the input; the result has the promoted dtype of both.

    Raises:
        ValueError: unknown activation; a residual that does not fit. Else whatever torch raises.

    Source: Wu and He 2018 (arXiv 1803.08494).
    """
    check_activation(activation)
    check_residual(input, residual)
    fused = activation is not None or residual is not None
    groups: Any = None
    epsilon: Any = None
    if takes(input, weight, bias, (None, None), 1, fused):
        groups, epsilon = plain(num_groups), plain(eps)
    good = is_integer(groups) and groups > 0 and is_number(epsilon)
    # Where a channel has one value, and each group one channel, torch refuses.
    if not (good and input.shape[1] % groups == 0 and input.numel() > groups):
        if weight is None and bias is not None and bias.shape == input.shape[1:2]:
            weight = torch.ones_like(bias)  # up to 2.13 torch has no gradients of a bias alone
        return activated(F.group_norm(input, num_groups, weight, bias, eps), activation, residual)
    form = Form(groups, epsilon, activation)
    return normalize(input, weight, bias, residual, None, None, form, autocast_dtype(input))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalizes each channel of each sample, then adds ``residual`` and applies ``activation``.

    Drop-in for :func:`torch.nn.functional.instance_norm`. Arguments as in :func:`fastreg.functional.batch_norm`, with
    ``use_input_stats`` for ``training``; the running statistics receive the mean over the samples of theirs.

    Source: Ulyanov, Vedaldi and Lempitsky 2016 (arXiv 1607.08022).
    """
    check_activation(activation)
    check_residual(input, residual)
    fused = activation is not None or residual is not None
    statistics = (running_mean, running_var)
    epsilon: Any = None
    part: Any = None
    if type(use_input_stats) is bool and takes(input, weight, bias, statistics, int(use_input_stats), fused):
        epsilon, part = plain(eps), plain_momentum(momentum, input)
    good = part is not None and is_number(epsilon)
    spatial = good and input.numel() // (input.shape[0] * input.shape[1])
    if not (good and spatial > 1 if use_input_stats else good and running_mean is not None):
        y = by_torch(
            F.instance_norm,
            input.contiguous(),  # as torch would make it
            *statistics,
            weight,
            bias,
            use_input_stats,
            momentum,
            eps,
            one_sample=True,
        )
        return activated(y, activation, residual)
    if not use_input_stats:  # fixed statistics of channels: batch normalization in evaluation
        return normalize(
            input, weight, bias, residual, statistics, None, Form(0, epsilon, activation), input.dtype
        )
    running = None if running_mean is None else Running(*statistics, part)
    form = Form(input.shape[1], epsilon, activation)
    return normalize(input, weight, bias, residual, None, running, form, input.dtype)
