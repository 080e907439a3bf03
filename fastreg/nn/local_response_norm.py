"""Local response normalization. What it adds to torch's: ``fastreg/nn/fused.py``."""

import torch
from torch import Tensor

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm


class LocalResponseNorm(FusedNorm, torch.nn.LocalResponseNorm):
    """Normalization over neighbouring channels.

    Args:
        size, alpha, beta, k: as in :class:`torch.nn.LocalResponseNorm`.
        activation: applied to the result, in the same pass: a name of ``fastreg.functional.ACTIVATIONS``.

    ``forward(input, *, residual=None)`` is activation(norm(input) + residual): see
    :func:`fastreg.functional.local_response_norm`.

    Source: Krizhevsky, Sutskever and Hinton 2012, section 3.3.
    """

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        activation: str | None = None,
    ) -> None:
        self._make(size, alpha, beta, k, activation=activation)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)."""
        return F.local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, activation=self.activation, residual=residual
        )
