"""Layer normalization, alone and behind a branch of a transformer. What it adds to torch's: ``fastreg/nn/fused.py``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.types import Device

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm
from fastreg.ops.checks import probability


class LayerNorm(FusedNorm, torch.nn.LayerNorm):
    """Layer normalization over the last dimensions.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in :class:`torch.nn.LayerNorm`.
        activation: applied to the result, in the same pass: a name of ``fastreg.functional.ACTIVATIONS``.

    ``forward(input, *, residual=None)`` is activation(norm(input) + residual): see
    :func:`fastreg.functional.layer_norm`.

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
    """The seam between two blocks of a transformer in one pass: h = skip + dropout(input), then norm(h).

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in :class:`torch.nn.LayerNorm`, whose
            parameters and ``state_dict`` it has; device and dtype by keyword.
        p: probability of dropping.
        prenorm: return (norm(h), h), as blocks that normalize first need it, instead of norm(h).
        activation: applied to the normalized values, in the same pass.

    ``forward(input, skip)``: see :func:`fastreg.functional.dropout_add_layer_norm`.
    """

    stochastic = True  # for mc_dropout

    # Defaults for layers whose class was changed: __init__ did not run.
    p = 0.5
    prenorm = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        p: float = 0.5,
        *,
        prenorm: bool = False,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        p = probability(p)
        self._make(normalized_shape, eps, elementwise_affine, bias, device, dtype, activation=activation)
        self.p = p
        self.prenorm = prenorm

    def forward(  # type: ignore[override]  # a pair with prenorm
        self, input: Tensor, skip: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return F.dropout_add_layer_norm(
            input,
            skip,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            self.p,
            self.training,
            prenorm=self.prenorm,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"
