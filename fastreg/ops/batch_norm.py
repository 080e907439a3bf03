"""Batch normalization, fused with residual and activation: y = f(BN(x) + residual)."""

import torch.nn.functional as F
from torch import Tensor

from fastreg.ops.fused import activated, check_activation, check_residual


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
    check_activation(activation)
    check_residual(input, residual)
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, float(momentum), eps)
    return activated(y, activation, residual)
