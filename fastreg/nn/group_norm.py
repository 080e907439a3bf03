"""Group and instance normalization layers. What they add to torch's: ``fastreg/nn/fused.py``."""

import warnings

import torch
from torch import Tensor
from torch.types import Device

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm


class GroupNorm(FusedNorm, torch.nn.GroupNorm):
    """Group normalization of ``[N, C, *]``.

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as in :class:`torch.nn.GroupNorm`.
        activation: applied to the result, in the same pass: a name of ``fastreg.functional.ACTIVATIONS``.

    ``forward(input, *, residual=None)`` is activation(norm(input) + residual): see
    :func:`fastreg.functional.group_norm`.

    Source: Wu and He 2018 (arXiv 1803.08494).
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        self._make(num_groups, num_channels, eps, affine, device, dtype, bias=bias, activation=activation)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)."""
        return F.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            residual=residual,
        )


class _InstanceNorm(FusedNorm, torch.nn.modules.instancenorm._InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        self._make(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation,
        )  # fmt: skip

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)."""
        self._check_input_dim(input)
        dim = input.dim() - self._get_no_batch_dim()
        if input.size(dim) != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={dim} to match num_features"
                    f" ({self.num_features}), but got: {input.size(dim)}."
                )
            warnings.warn(
                f"input's size at dim={dim} does not match num_features. "
                "You can silence this warning by not passing in num_features, "
                "which is not used because affine=False",
                stacklevel=2,
            )
        unbatched = dim == 0
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        y = F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
        )
        return y.squeeze(0) if unbatched else y


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """Instance normalization of ``[N, C, L]`` or ``[C, L]``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            :class:`torch.nn.InstanceNorm1d`.
        activation: applied to the result, in the same pass: a name of ``fastreg.functional.ACTIVATIONS``.

    ``forward(input, *, residual=None)`` is activation(norm(input) + residual): see
    :func:`fastreg.functional.instance_norm`.

    Source: Ulyanov, Vedaldi and Lempitsky 2016 (arXiv 1607.08022).
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """Instance normalization of ``[N, C, H, W]`` or ``[C, H, W]``. Arguments as in :class:`InstanceNorm1d`."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """Instance normalization of ``[N, C, D, H, W]`` or ``[C, D, H, W]``. Arguments as in :class:`InstanceNorm1d`."""
