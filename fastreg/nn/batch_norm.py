"""Batch normalization layers. What they add to torch's: ``fastreg/nn/fused.py``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.types import Device

from fastreg import functional as F
from fastreg.nn.fused import FusedNorm


class _BatchNorm(FusedNorm, torch.nn.modules.batchnorm._BatchNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
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
        updates = self.training and self.track_running_stats
        momentum: float | Tensor | None = self.momentum
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                # The average over all batches; as a tensor, so that nothing waits for the GPU.
                momentum = self.num_batches_tracked.double().reciprocal()
        # Buffers that are not tracked are used in evaluation, and neither used nor changed in training.
        buffers = updates or not self.training
        return self._normalized(
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

    def _normalized(self, *arguments: Any, **keywords: Any) -> Tensor:
        return F.batch_norm(*arguments, **keywords)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of ``[N, C]`` or ``[N, C, L]``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            :class:`torch.nn.BatchNorm1d`.
        activation: applied to the result, in the same pass: a name of ``fastreg.functional.ACTIVATIONS``.

    ``forward(input, *, residual=None)`` is activation(norm(input) + residual): see
    :func:`fastreg.functional.batch_norm`.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of ``[N, C, H, W]``. Arguments as in :class:`BatchNorm1d`."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of ``[N, C, D, H, W]``. Arguments as in :class:`BatchNorm1d`."""


class SyncBatchNorm(_BatchNorm, torch.nn.SyncBatchNorm):
    """Batch normalization of ``[N, C, *]`` over the batches of all processes.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias: as in
            :class:`torch.nn.SyncBatchNorm`.
        activation: as in :class:`BatchNorm1d`, as is ``forward``.

    Batches may differ in size, and be empty. Nothing waits for the GPU (CUDA graphs can be captured), and CPU tensors
    work where the processes communicate with gloo; DistributedDataParallel, though, refuses every SyncBatchNorm on
    the CPU. In evaluation, and in a single process, it is ``BatchNorm*d``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        self._make(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype,
            bias=bias, activation=activation,
        )  # fmt: skip

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        self._check_non_zero_input_channels(input)

    def _normalized(self, *arguments: Any, **keywords: Any) -> Tensor:
        if not self.training:
            return super()._normalized(*arguments, **keywords)
        return F.sync_batch_norm(*arguments, group=self.process_group, **keywords)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """``module`` with every batch normalization in it, torch's or ours, replaced by a layer of this class.

        Parameters and buffers stay the same tensors. A module that is such a layer itself is not changed: the layer
        to take its place is returned. Hooks are not taken over (as in torch).

        Raises:
            ValueError: a lazy layer that does not know its number of channels yet.
        """
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            return cls._converted(module, process_group)
        for name, child in module.named_children():
            converted = cls.convert_sync_batchnorm(child, process_group)
            if converted is not child:
                setattr(module, name, converted)
        return module

    @classmethod
    def _converted(cls, layer: torch.nn.modules.batchnorm._BatchNorm, process_group: Any) -> "SyncBatchNorm":
        if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError("a lazy layer cannot be converted before its first batch")
        new = cls(
            layer.num_features,
            layer.eps,
            layer.momentum,
            layer.affine,
            layer.track_running_stats,
            process_group,
            device="meta",  # its tensors are about to be replaced
            activation=layer.activation if isinstance(layer, FusedNorm) else None,
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(new, name, getattr(layer, name))
        new.training = layer.training
        if hasattr(layer, "qconfig"):
            new.qconfig = layer.qconfig
        return new
