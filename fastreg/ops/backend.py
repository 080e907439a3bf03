"""Where an operation runs: on the Triton kernels, or on ATen."""

import contextlib
import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _get_dispatch_mode as dispatch_mode
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C import _TorchDispatchModeKey as _Mode
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None
"""Triton is installed, for NVIDIA GPUs (the kernels hold PTX instructions)."""

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's interpreter runs the kernels, on CPU tensors: how they are tested without a GPU."""

OLDEST_CAPABILITY = (8, 0)  # Ampere: bf16, and the min/max that keep NaN

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors with no ideas of their own."""

_KERNEL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_plain(x: Tensor) -> bool:
    """Not of a subclass with ideas of its own (DTensor, FakeTensor), nor a proxy of ``torch.fx``."""
    return torch.compiler.is_compiling() or type(x) in PLAIN


def runs_kernels(x: Tensor) -> bool:
    """Whether ``x`` goes to the Triton kernels.

    Everything else goes to ATen, with the same function: CPU tensors, dtypes ATen refuses or promotes, tensor
    subclasses (DTensor, FakeTensor), proxies of ``torch.fx``, and what is ``watched``.
    """
    compiling = torch.compiler.is_compiling()
    # The type first: there is nothing to decide about a Proxy of torch.fx.
    if not HAS_TRITON or not (compiling or type(x) in PLAIN):
        return False
    if x.dtype not in _KERNEL_DTYPES or not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return False
    return compiling or (
        not watched()
        and not is_legacy_batchedtensor(x)  # a backward pass with is_grads_batched=True
        and (INTERPRETED or _capable(x.device.index))
    )


def watched() -> bool:
    """Whether every operation of ATen is watched, so that a kernel or an ``autograd.Function`` would go unseen.

    By a transform of ``torch.func`` or forward-mode AD, for which ATen brings the batching and tangent rules; by
    ``torch.jit.trace`` or ``make_fx``, which record operations; by ``FakeTensorMode``, where tensors have no data.
    """
    return (
        transforms_active()
        or forward_ad._current_level >= 0
        or is_tracing()
        or (dispatch_modes() > 0 and any(dispatch_mode(key) is not None for key in (_Mode.PROXY, _Mode.FAKE)))
    )


def choose(x: Tensor) -> str:
    """The name of the backend for ``x``: "triton" or "aten"."""
    return "triton" if runs_kernels(x) else "aten"


@functools.cache
def _capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= OLDEST_CAPABILITY


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; an H100's number where it is no GPU (interpreter, inspection)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def allows_tf32() -> bool:
    """Whether torch's products of fp32 matrices may take TF32, whichever of torch's switches says so."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises beside the newer switches


def number(name: str, value: float | Tensor, absent: float) -> dict[str, Any]:
    """The two arguments of a number that may lie in memory: a pointer, or None and the number itself."""
    if isinstance(value, Tensor):
        return {f"{name}_ptr": value, name: absent}
    return {f"{name}_ptr": None, name: value}


class Launch(NamedTuple):
    """A kernel with everything it is launched with: what runs, and what ``fastreg inspect`` compiles."""

    kernel: Any  # a @triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Launches on the tensors' ``device``, which need not be the current one."""
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments)
