"""Modules, drop-in for ``torch.nn``: every class is a subclass of torch's own where torch has one."""

from fastreg.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from fastreg.nn.drop_connect import DropConnectConv2d, DropConnectLinear
from fastreg.nn.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
)
from fastreg.nn.group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastreg.nn.layer_norm import DropoutAddLayerNorm, LayerNorm
from fastreg.nn.local_response_norm import LocalResponseNorm
from fastreg.nn.noise import GaussianNoise
from fastreg.nn.noisy_linear import NoisyLinear

__all__ = [
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DropConnectConv2d",
    "DropConnectLinear",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAddLayerNorm",
    "FeatureAlphaDropout",
    "GaussianNoise",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LocalResponseNorm",
    "NoisyLinear",
    "SyncBatchNorm",
]
