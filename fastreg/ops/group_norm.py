"""Group and instance normalization, fused with residual and activation: y = f(GN(x) + residual)."""

import torch.nn.functional as F
from torch import Tensor

from fastreg.ops.fused import activated, check_activation, check_residual


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
    check_activation(activation)
    check_residual(input, residual)
    return activated(F.group_norm(input, num_groups, weight, bias, eps), activation, residual)


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
    check_activation(activation)
    check_residual(input, residual)
    y = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return activated(y, activation, residual)
