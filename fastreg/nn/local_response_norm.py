"""Local response normalization. What it adds to torch's: ``fastreg/nn/fused.py``."""

import torch
from torch import Tensor

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm


class LocalResponseNorm(FusedNorm, torch.nn.LocalResponseNorm):
    """Normalization over neighbouring channels. See :class:`torch.nn.LocalResponseNorm`.

    Source: Krizhevsky, Sutskever and Hinton 2012, section 3.3.
    """

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)."""
        return F.local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, activation=self.activation, residual=residual
        )
