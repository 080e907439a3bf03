"""Batch normalization layers. What they add to torch's: ``fastreg/nn/fused.py``."""

import torch
from torch import Tensor

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm


class _BatchNorm(FusedNorm):
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
