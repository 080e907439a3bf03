"""The checks that random linear layers share."""

import torch
from torch import Tensor

from fastreg.ops import backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of their kernels: fp64 is left to ATen


def on_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether ``x`` goes to the kernels, with other tensors of its device."""
    return (
        x.dtype in _DTYPES
        and all(t is None or (t.dtype in _DTYPES and backend.is_plain(t)) for t in others)
        and backend.runs_kernels(x)
    )


def cast_by_autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to the arguments of torch's linear."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which refuses to answer for "meta"
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(input, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def torch_refuses(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return True
    others = (weight,) if bias is None else (weight, bias)
    return any(t.dtype != input.dtype or t.device != input.device for t in others) or (
        bias is not None and bias.shape != weight.shape[:1]
    )
