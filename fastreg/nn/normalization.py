"""Normalization layers: torch's classes, with ``activation=`` and a residual in the same passes.

Each takes torch's constructor arguments and the keyword ``activation``, a name of
``fastreg.ops.fused.ACTIVATIONS``; ``forward(input, *, residual=None)`` is ``activation(norm(input) + residual)``, where
the residual has the input's shape. Parameters, buffers, ``state_dict`` and errors are torch's.
"""

import warnings

import torch
from torch import Tensor

from fastreg import functional as F
from fastreg.ops.fused import check_activation


class _Fused:
    """What all normalization layers of fastreg add to torch's."""

    activation: str | None = None  # of layers unpickled from torch's classes, or whose class was changed

    def __init__(self, *arguments, activation: str | None = None, **keywords) -> None:
        check_activation(activation)
        super().__init__(*arguments, **keywords)
        self.activation = activation

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"


class _BatchNorm(_Fused):
    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)."""
        self._check_input_dim(input)
        updates = self.training and self.track_running_stats
        momentum = self.momentum
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if (
                momentum is None
            ):  # the average over all batches; as a tensor, so that nothing waits for the GPU
                momentum = self.num_batches_tracked.reciprocal()
        # Buffers that are not tracked are used in evaluation, and neither used nor changed in training.
        buffers = updates or not self.training
        return F.batch_norm(
            input,
            self.running_mean if buffers else None,
            self.running_var if buffers else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            0.0 if momentum is None else momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
        )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of ``[N, C]`` or ``[N, C, L]``. See :class:`torch.nn.BatchNorm1d`.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of ``[N, C, H, W]``. See :class:`torch.nn.BatchNorm2d`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of ``[N, C, D, H, W]``. See :class:`torch.nn.BatchNorm3d`."""


class GroupNorm(_Fused, torch.nn.GroupNorm):
    """Group normalization of ``[N, C, *]``. See :class:`torch.nn.GroupNorm`.

    Source: Wu and He 2018 (arXiv 1803.08494).
    """

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


class LayerNorm(_Fused, torch.nn.LayerNorm):
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


class _InstanceNorm(_Fused):
    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)."""
        self._check_input_dim(input)
        channels = input.size(-self._get_no_batch_dim())
        if channels != self.num_features:
            message = (
                f"expected input's size at dim={input.dim() - self._get_no_batch_dim()} to match num_features"
                f" ({self.num_features}), but got: {channels}."
            )
            if self.affine:
                raise ValueError(message)
            warnings.warn(message + " affine=False, so num_features is not used.", stacklevel=2)
        unbatched = input.dim() == self._get_no_batch_dim()
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
    """Instance normalization of ``[N, C, L]`` or ``[C, L]``. See :class:`torch.nn.InstanceNorm1d`.

    Source: Ulyanov, Vedaldi and Lempitsky 2016 (arXiv 1607.08022).
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """Instance normalization of ``[N, C, H, W]`` or ``[C, H, W]``. See :class:`torch.nn.InstanceNorm2d`."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """Instance normalization of ``[N, C, D, H, W]`` or ``[C, D, H, W]``. See :class:`torch.nn.InstanceNorm3d`."""
