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


def cast_by_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the arguments of torch's linear."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which refuses to answer for "meta"
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def torch_refuses(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return True
    others = (weight,) if bias is None else (weight, bias)
    return any(t.dtype != input.dtype or t.device != input.device for t in others) or (
        bias is not None and bias.shape != weight.shape[:1]
    )
