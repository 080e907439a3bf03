"""Layer normalization, fused with residual and activation: y = f(LN(x) + residual)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastreg.ops.fused import activated, check_activation, check_residual


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_activation(activation)
    check_residual(input, residual)
    return activated(F.layer_norm(input, normalized_shape, weight, bias, eps), activation, residual)
