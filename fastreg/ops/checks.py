"""The checks of arguments that several families share. Those of numbers alone: ``arguments.py``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from fastreg.ops.arguments import is_number, number, plain
from fastreg.ops.fused import ACTIVATIONS


def checked_p(input: Tensor, p: float, training: bool, aten: Callable[..., Tensor] = F.dropout) -> float:
    """``p`` as Python's number. ``aten``, torch's function, refuses what is none, or out of bounds."""
    found = plain(p)
    if not (is_number(found) and 0.0 <= found <= 1.0 and type(training) in (bool, Proxy)):
        aten(input, p, training, False)
    return found


def probability(p: float) -> float:
    """``p`` as Python's number, for a function that torch has not."""
    if type(p) is not float:
        p = number("p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")


def check_residual(input: Tensor, residual: Tensor | None, name: str = "residual") -> None:
    if residual is None:
        return
    if residual.shape != input.shape:
        raise ValueError(
            f"the {name} has to have the shape of the input, "
            f"but got {tuple(residual.shape)} for an input of shape {tuple(input.shape)}"
        )
    check_same_device(input, residual, name)


def check_same_device(input: Tensor, other: Tensor | None, name: str) -> None:
    if other is not None and other.device != input.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, "
            f"but got the input on {input.device} and the {name} on {other.device}"
        )


def check_leaf(input: Tensor) -> None:
    """Before it is written in place, where gradients are recorded."""
    if input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
