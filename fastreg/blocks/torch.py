"""torch's own layers."""

from torch import nn

from fastreg import nn as fnn
from fastreg.blocks.swap import Swap

NAMES = (
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LocalResponseNorm",
    "SyncBatchNorm",
)

SWAPS = [Swap(getattr(nn, name), getattr(fnn, name)) for name in NAMES]
