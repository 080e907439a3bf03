"""Functions, drop-in for ``torch.nn.functional``: a list of names, the logic is in ``fastreg.ops``."""

from fastreg.ops.dropout import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from fastreg.ops.fused import ACTIVATIONS
from fastreg.ops.linear.drop_connect import drop_connect_linear
from fastreg.ops.linear.noisy_linear import noisy_linear
from fastreg.ops.noise import gaussian_noise
from fastreg.ops.norms.batch_norm import batch_norm
from fastreg.ops.norms.group_norm import group_norm, instance_norm
from fastreg.ops.norms.layer_norm import dropout_add_layer_norm, layer_norm
from fastreg.ops.norms.local_response_norm import local_response_norm
from fastreg.ops.norms.sync_batch_norm import sync_batch_norm

__all__ = [
    "ACTIVATIONS",
    "alpha_dropout",
    "batch_norm",
    "drop_connect_linear",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add_layer_norm",
    "feature_alpha_dropout",
    "gaussian_noise",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "noisy_linear",
    "sync_batch_norm",
]
