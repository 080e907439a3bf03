"""Tensors in memory order: how an operation on a tensor of any rank becomes a kernel on rows of columns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


def memory_order(x: Tensor) -> list[int] | None:
    """The dimensions of size other than 1 from the outermost in memory to the innermost, or None: not dense."""
    size, stride = x.shape, x.stride()
    order = sorted((d for d in range(x.dim()) if size[d] != 1), key=lambda d: stride[d], reverse=True)
    expected = 1
    for d in reversed(order):
        if stride[d] != expected:
            return None
        expected *= size[d]
    return order


def is_dense(x: Tensor) -> bool:
    """Whether the memory of ``x`` has neither gaps nor overlaps."""
    return x.is_contiguous() or memory_order(x) is not None


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is dense, else a dense copy in the order of its strides."""
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


def can_be_written(x: Tensor) -> bool:
    """Whether no two elements of ``x`` share memory. (As in torch, only expanded dimensions are looked at.)"""
    if x.layout != torch.strided:
        return False
    return x.is_contiguous() or not any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))


def check_written(x: Tensor, name: str) -> None:
    """Raises where ``x`` cannot be written: before the first of several tensors is."""
    if x.layout != torch.strided:
        raise RuntimeError(f"{name}: a dense tensor is needed, but got one of layout {x.layout}")
    if not can_be_written(x):
        raise RuntimeError(
            f"{name}: unsupported operation: more than one element of the written-to tensor refers to a single memory "
            "location. Please clone() the tensor before performing the operation."
        )


def check_inference(x: Tensor, name: str) -> None:
    """Raises where ``x`` is of inference mode, and this is not. (torch raises after it has written.)"""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: Inplace update to inference tensor outside InferenceMode is not allowed. You can make a clone to "
            "get a normal tensor before doing inplace update."
        )


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of ``dense(x)``; in a ``torch.func`` transform, contiguous ones where ``x`` has gaps."""
    if torch.compiler.is_compiling():
        # Strides may be symbols, which Dynamo does not sort.
        return torch.empty_like(x, device="meta").stride()
    if torch._C._are_functorch_transforms_active():
        # Under vmap the memory of an example also holds the others', and is_contiguous() speaks of all together.
        if memory_order(x) is not None:
            return x.stride()
        return torch.empty(x.shape, dtype=x.dtype, device="meta").stride()
    return x.stride() if is_dense(x) else torch.empty_like(x, device="meta").stride()


def with_strides(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``x`` laid out with the given dense strides: itself, or a copy."""
    if x.stride() == stride:
        return x
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def empty_dense(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a tensor with these dense strides.

    In a graph it is a view of ``torch.empty``. The compiler takes equal calls of ``empty_strided`` for one, whose
    result it copies, and keeps from the forward pass for the backward pass.
    """
    if torch.compiler.is_compiling():
        return torch.empty(shape.numel(), dtype=dtype, device=device).as_strided(shape, stride)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. (``triton.cdiv`` takes ten times as long on the host.)"""
    return -(-a // b)


def row_blocks(columns: int) -> tuple[int, int]:
    """For an elementwise pass over rows: the columns of a program, and how many such blocks a row has."""
    block = min(1024, max(64, 1 << (columns - 1).bit_length()))
    return block, ceil_div(columns, block)


class Tiling(NamedTuple):
    """A dense tensor as ``rows`` x ``columns`` in memory order, and what its mask and its bias vary along."""

    rows: int | None  # None: all is one row
    columns: int
    mask: str = "element"  # "element": one lane an element of rows / mask_repeat x columns; "row": one a row
    mask_repeat: int = 1  # rows that share a row of the mask
    bias: str | None = None  # "columns" or "rows"
    bias_repeat: int = 1  # rows that share a bias, where it varies along the rows
    bias_size: int = 1


def tiling(x: Tensor, mask_dims: int, bias_dim: int | None) -> Tiling | None:
    """How to tile the dense tensor ``x``, or None if its layout mixes what has to stay together.

    mask_dims: the mask varies along all dimensions (0), the first (1: samples) or the first two (2: channels).
    bias_dim: the dimension the bias varies along, or None.
    """
    count = x.numel()
    if mask_dims == 0 and bias_dim is None:
        return Tiling(None, count)
    masked, channels_last = count, False
    if mask_dims > 0:
        masked = x.shape[:mask_dims].numel()
        order = memory_order(x)
        if order is None:
            return None
        leading = [d for d in range(mask_dims) if x.shape[d] != 1]
        if order[: len(leading)] != leading:
            samples_first = x.shape[0] == 1 or order[0] == 0
            channels_last = mask_dims == 2 and samples_first and order[-1] == 1
            if not channels_last:
                return None
    if bias_dim is None:
        if masked == count:
            return Tiling(None, count)
        columns = x.shape[1] if channels_last else count // masked
        bias: dict[str, Any] = {}
    elif x.stride(bias_dim) == 1:
        columns = x.shape[bias_dim]
        bias = {"bias": "columns", "bias_size": columns}
    else:
        columns = x.stride(bias_dim) if masked == count else min(x.stride(bias_dim), count // masked)
        bias = {"bias": "rows", "bias_repeat": x.stride(bias_dim) // columns, "bias_size": x.shape[bias_dim]}
    rows = count // columns
    if masked == count:
        return Tiling(rows, columns, **bias)
    if channels_last:
        # The mask is a tensor (samples, channels): every position of a sample takes the same row of it.
        return Tiling(rows, columns, "element", rows // x.shape[0], **bias) if bias_dim in (None, 1) else None
    return Tiling(rows, columns, "row", rows // masked, **bias)
