"""What may stand around an operation in the same pass: an activation and a residual."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "mish": F.mish,
    "hardswish": F.hardswish,
}
"""What ``activation=`` may name, and its definition: torch's function with torch's default parameters."""


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")


def check_residual(input: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    if residual.shape != input.shape:
        raise ValueError(
            "the residual has to have the shape of the input, "
            f"but got {tuple(residual.shape)} for an input of shape {tuple(input.shape)}"
        )
    check_same_device(input, residual, "residual")


def check_same_device(input: Tensor, other: Tensor | None, name: str) -> None:
    if other is not None and other.device != input.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, "
            f"but got the input on {input.device} and the {name} on {other.device}"
        )


def activated(v: Tensor, activation: str | None, residual: Tensor | None = None) -> Tensor:
    """activation(v + residual), in ATen."""
    v = v if residual is None else v + residual
    return v if activation is None else ACTIVATIONS[activation](v)


def autocast_dtype(input: Tensor) -> torch.dtype:
    """What torch's group_norm and layer_norm return: fp32 under CUDA's autocast, else the dtype of the input.

    Torch casts the input first; we read its 16 bits.
    """
    if input.dtype.itemsize == 2 and input.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return input.dtype


def result_dtype(dtype: torch.dtype, residual: Tensor | None) -> torch.dtype:
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over elements of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
