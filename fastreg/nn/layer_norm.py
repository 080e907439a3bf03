"""Layer normalization, alone and behind a residual branch. What it adds to torch's: ``fastreg/nn/fused.py``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.types import Device

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm
from fastreg.ops.arguments import number


class LayerNorm(FusedNorm, torch.nn.LayerNorm):
    """Layer normalization over the last dimensions.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in :class:`torch.nn.LayerNorm`.
        activation: applied to the result, in the same pass: a name of ``fastreg.ops.fused.ACTIVATIONS``.

    ``forward(input, *, residual=None)`` is activation(norm(input) + residual), with a residual of the input's shape.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        self._make(normalized_shape, eps, elementwise_affine, bias, device, dtype, activation=activation)

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


class DropoutAddLayerNorm(FusedNorm, torch.nn.LayerNorm):
    """The seam between two blocks of a transformer in one pass: h = residual + dropout(input), then norm(h).

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in :class:`torch.nn.LayerNorm`, whose
            parameters and ``state_dict`` it has.
        p: probability of dropping.
        prenorm: return (norm(h), h), as blocks that normalize first need it, instead of norm(h).
        activation: applied to the normalized values, in the same pass.

    ``forward(input, residual)``: see :func:`fastreg.functional.dropout_add_layer_norm`.
    """

    stochastic = True  # for mc_dropout

    # Of layers whose class was changed: __init__ did not run.
    p = 0.5
    prenorm = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float = 0.5,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        prenorm: bool = False,
        activation: str | None = None,
    ) -> None:
        p = number("p", p)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self._make(normalized_shape, eps, elementwise_affine, bias, device, dtype, activation=activation)
        self.p = p
        self.prenorm = prenorm

    def forward(  # type: ignore[override]  # a pair with prenorm
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return F.dropout_add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.p,
            self.training,
            self.eps,
            prenorm=self.prenorm,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"
