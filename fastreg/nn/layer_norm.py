"""Layer normalization. What it adds to torch's: ``fastreg/nn/fused.py``."""

import torch
from torch import Tensor

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm


class LayerNorm(FusedNorm, torch.nn.LayerNorm):
    """Layer normalization over the last dimensions. See :class:`torch.nn.LayerNorm`.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)."""
        return F.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            residual=residual,
        )
