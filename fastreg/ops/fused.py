"""What may stand around an operation in the same pass: an activation and a residual."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _quick_gelu(v: Tensor) -> Tensor:
    """v sigmoid(1.702 v), which torch has not. Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""
    return v * torch.sigmoid(1.702 * v)


def _hardsigmoid(v: Tensor) -> Tensor:
    """Torch's own has no second derivative, and its first one is fp32 for fp64 tensors."""
    return (F.hardtanh(v, -3.0, 3.0) + 3) / 6


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
    "relu6": F.relu6,
    "hardsigmoid": _hardsigmoid,
    "quick_gelu": _quick_gelu,
}
"""What ``activation=`` may name, and its definition: torch's function with torch's default parameters."""


OF_OUTPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "leaky_relu": lambda dy, y: torch.ops.aten.leaky_relu_backward(dy, y, 0.01, True),
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "tanh": torch.ops.aten.tanh_backward,
    "elu": lambda dy, y: torch.ops.aten.elu_backward(dy, 1, 1, 1, True, y),
    "relu6": lambda dy, y: torch.ops.aten.hardtanh_backward(dy, y, 0, 6),
}
"""dy f'(v) where it follows from y = f(v): then nothing is kept for it but y, which the next layer keeps too."""


def needs_argument(activation: str | None) -> bool:
    """Whether the derivative of y = f(v) needs v, rather than y."""
    return activation is not None and activation not in OF_OUTPUT


def derivative(activation: str | None) -> str | None:
    """The name by which the kernels know f' as a function of what is kept for it."""
    return f"{activation}_of_output" if activation in OF_OUTPUT else activation


def kept_of(y: Tensor, v: Tensor | None, activation: str | None) -> Tensor | None:
    """What the derivative of y = f(v) needs."""
    if activation is None:
        return None
    return v if needs_argument(activation) else y


def activation_gradient(
    dy: Tensor | None, kept: Tensor, activation: str, dv: Tensor | None = None
) -> Tensor | None:
    """dy f'(v) + dv, in ATen, differentiable. kept: v, or y = f(v) where that is enough; None is no gradient."""
    if dy is None:
        return dv
    if activation in OF_OUTPUT:
        found = OF_OUTPUT[activation](dy, kept)
    else:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            v = kept if kept.requires_grad else kept.detach().requires_grad_()
            y = ACTIVATIONS[activation](v)
        (found,) = torch.autograd.grad(y, v, dy, create_graph=create_graph)
    return found if dv is None else found + dv


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
