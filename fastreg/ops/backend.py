"""Where an operation runs: on the Triton kernels, or on ATen."""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

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

_Function = TypeVar("_Function", bound=Callable[..., Any])

_KERNEL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_plain(x: Tensor) -> bool:
    """True for exactly Tensor and Parameter, strided. Subclasses (DTensor, FakeTensor) and proxies go through ATen."""
    return (type(x) in PLAIN and x.layout == torch.strided) or torch.compiler.is_compiling()


def runs_kernels(x: Tensor) -> bool:
    """Whether ``x`` goes to the Triton kernels.

    Everything else goes to ATen, with the same function: CPU tensors, dtypes ATen refuses or promotes, sparse
    tensors, subclasses (DTensor, FakeTensor), proxies of ``torch.fx``, and what is ``watched``.
    """
    compiling = torch.compiler.is_compiling()
    # The type first: there is nothing to decide about a Proxy of torch.fx.
    if not HAS_TRITON or not (compiling or type(x) in PLAIN):
        return False
    if x.layout != torch.strided or x.dtype not in _KERNEL_DTYPES:
        return False
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return False
    if not (INTERPRETED or _capable(x.device.index)):
        return False
    return compiling or (
        not watched() and not is_legacy_batchedtensor(x)  # a backward pass with is_grads_batched=True
    )


def goes_with(x: Tensor, first: Tensor) -> bool:
    """Whether the kernels take ``x`` beside ``first``, of which ``runs_kernels`` is known."""
    return is_plain(x) and x.device == first.device and x.dtype in _KERNEL_DTYPES


ATEN_BELOW = {"dropout": 1 << 18, "noise": 1 << 18, "layer_norm": 1 << 18, "channel_norm": 1 << 16}
"""Plain operations of fewer elements, which ATen has too, go to ATen on a GPU.

Our launches take more of the host than torch's: a call of dropout 11 us more, one of a norm 18 us (bench/RESULTS.md, on
the host). So a GPU must have that much to do before it waits for us, and something to gain: 2^18 elements of fp32, read
and written once, are 0.7 us of an H100's memory, about the least that any kernel takes. ATen's batch norm reads its
input more often, in more launches: a quarter of the elements. (Estimates, until they are timed on a GPU.)
"""


def worth_a_launch(x: Tensor, operation: str) -> bool:
    """Whether a plain operation on ``x`` is worth a kernel of ours.

    A compiled graph takes batches of any size, and on the CPU there is no launch.
    """
    return torch.compiler.is_compiling() or not x.is_cuda or x.numel() >= ATEN_BELOW[operation]


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
def _capability(index: int) -> tuple[int, int]:
    """The capability of a GPU. Where there is none, and a graph is only traced for it, the oldest one will do."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else OLDEST_CAPABILITY


def constant_in_graphs(function: _Function) -> _Function:
    """Has torch.compile call it at once, and take the result for a constant.

    As ``torch.compiler.assume_constant_result``, which would import the compiler: three seconds.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_in_graphs
def _capable(index: int) -> bool:
    return _capability(index) >= OLDEST_CAPABILITY


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; an H100's number where it is no GPU (interpreter, inspection)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def recording() -> bool:
    """Whether a CUDA graph is being recorded: what is launched, and copied, is done at every replay, and not now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _stream_capture_info() -> Any:
    """The driver's function, which torch does not hand on, or None."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None


def capture_id(device: torch.device) -> int | None:
    """CUDA's number of the graph that records the current stream of ``device``, or None where it cannot be asked."""
    ask = _stream_capture_info()
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    if ask is None or ask(stream, ctypes.byref(status), ctypes.byref(number), None, None, None):
        return None
    return number.value


def allows_tf32() -> bool:
    """Whether torch's products of fp32 matrices may take TF32, whichever of torch's switches says so."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises beside the newer switches


OPTIONS = {"enable_fp_fusion": True}
"""The options of every kernel. They are given each time: versions of Triton differ in whether they fuse products and
sums."""

MOST_PROGRAMS = 2**31 - 1  # of a grid


def number(name: str, value: float | Tensor, absent: float) -> dict[str, Any]:
    """The two arguments of a number that may lie in memory: a pointer, or None and the number itself."""
    if isinstance(value, Tensor):
        return {f"{name}_ptr": value, name: absent}
    return {f"{name}_ptr": None, name: value}


def is_struct(value: Any) -> bool:
    """Whether it is one of the kernels' named tuples."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of arguments; of a struct, those of its fields: ("tile.rows", 8)."""
    for name, value in arguments.items():
        if is_struct(value):
            yield from leaves({f"{name}.{field}": each for field, each in value._asdict().items()})
        else:
            yield name, value


def with_leaves(arguments: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with other values for some leaves, by name."""
    result = dict(arguments)
    for name, value in new.items():
        argument, _, field = name.partition(".")
        result[argument] = result[argument]._replace(**{field: value}) if field else value
    return result


_NOWHERE = torch.empty(0, dtype=torch.int64, device="cpu")  # its address is 0

_loaded: set[Any] = set()
"""Variants of kernels whose other form of the seed is loaded, too."""


class Launch(NamedTuple):
    """A kernel with everything it is launched with: what runs, and what ``fastreg inspect`` compiles."""

    kernel: Any  # a @triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # a struct is one argument: a named tuple of kernels/

    @property
    def leaves(self) -> dict[str, Any]:
        """All arguments, those in structs by dotted names: ``launch.leaves["tile.rows"]``."""
        return dict(leaves(self.arguments))

    def run(self, device: torch.device) -> Any:
        """Launches on the tensors' ``device``, which need not be the current one. Returns what Triton compiled."""
        if device.type != "cuda":
            return self.kernel[self.grid](**self.arguments, **OPTIONS)
        with torch.cuda.device(device):
            variant = self.kernel[self.grid](**self.arguments, **OPTIONS)
            if self.arguments.get("seed") and variant not in _loaded:
                self._load_for_graphs()
                _loaded.add(variant)
        return variant

    def _load_for_graphs(self) -> None:
        """Loads, without a launch, the variant that takes the seed from memory.

        A CUDA graph needs it, and while one is recorded nothing can be loaded. (One form for both would have to be the
        one from memory, whose seed takes 16 registers a thread where a number takes none.)
        """
        self.kernel[(0,)](**self.arguments | number("seed", _NOWHERE, 0), **OPTIONS)
