"""Triton's interpreter, twice as fast, and with an eye on every address; what it computes stays as it is, but for an
fma: until Triton 3.8 it rounds the product too, and here, as on a GPU, the result alone.

Fast: it replaces the builtins of ``triton.language`` by its own at every launch and at every call of a device function,
and looks at all that the language has to find them: here this happens once, for good. And for every sum, difference and
product of integers it computes whether it overflows, in ten more operations, and asserts the result in a debug mode
that nothing turns on: here it does not.

Careful: a load or a store outside of the tensors of its launch fails, where the interpreter itself would read or write
whatever lies there, as a GPU would.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

# The interpreter replaces what a function sees: those of this project see tl, those of Triton's own library core.
import triton.language as tl  # noqa: F401
from torch.utils._pytree import tree_leaves
from triton.language import core  # noqa: F401
from triton.runtime import interpreter


class Memory:
    """The loads and stores of the interpreter's library, in the tensors of the launch alone."""

    def __init__(self, library):
        self._library = library
        self._starts = self._ends = None  # of the memory that may be touched; None: any
        self.beside: list[torch.Tensor] | None = None
        """Tensors that tables of addresses point to. None: kernels with such tables may touch any memory."""

    def __getattr__(self, name):
        return getattr(self._library, name)

    def allow(self, names: Iterable[str], values: Iterable) -> None:
        tensors = [value for value in tree_leaves(list(values)) if isinstance(value, torch.Tensor)]
        if "entries_ptr" in names:
            if self.beside is None:
                self._starts = None
                return
            tensors += self.beside
        spans = sorted(extent(x) for x in tensors if x.numel())
        starts, ends = [], []
        for start, end in spans:
            if ends and start < ends[-1]:  # views of the same memory
                ends[-1] = max(end, ends[-1])
            else:
                starts.append(start)
                ends.append(end)
        self._starts, self._ends = np.array(starts, np.uint64), np.array(ends, np.uint64)

    def load(self, addresses, mask, other, dtype):
        self._check("reads", addresses[mask], np.dtype(dtype).itemsize)
        return self._library.load(addresses, mask, other, dtype)

    def store(self, addresses, values, mask):
        self._check("writes", addresses[mask], values.dtype.itemsize)
        return self._library.store(addresses, values, mask)

    def _check(self, does: str, addresses, itemsize: int) -> None:
        if self._starts is None or not addresses.size:
            return
        span = np.searchsorted(self._starts, addresses, "right") - 1
        inside = (span >= 0) & (addresses + np.uint64(itemsize) <= self._ends[span])
        if not inside.all():
            raise IndexError(f"the kernel {does} {np.count_nonzero(~inside)} elements outside of its tensors")


def extent(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first byte of ``x`` and of the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


memory = Memory(interpreter._interpreter)


def prepare() -> None:
    interpreter._patch_lang(prepare)  # of both modules, as this function sees both
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()  # with nothing to take back
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if not hasattr(memory, "fma_fp64"):
        interpreter.InterpreterBuilder.create_fma = _create_fma

    interpreter._interpreter = memory
    on_the_host = interpreter.GridExecutor._init_args_hst

    def arguments(self, positional, keywords):
        positional, keywords = on_the_host(self, positional, keywords)
        memory.allow(keywords, [*positional, *keywords.values()])
        return positional, keywords

    interpreter.GridExecutor._init_args_hst = arguments


def _create_fma(self, x, y, z):
    return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z, rounded once (twice where the first rounding makes a tie): fp16 and fp32 by way of fp64, where products
    are exact; fp64 by what its rounded product and sum have lost (Dekker 1971)."""
    if z.dtype != np.float64:
        return (x.astype(np.float64) * y + z).astype(z.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        product = x * y
        total = product + z
        (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
        lost = x_low * y_low - (product - x_high * y_high - x_low * y_high - x_high * y_low)
        z_kept = total - product
        lost += (product - (total - z_kept)) + (z - z_kept)
        return np.where(np.isfinite(lost) & (lost != 0), total + lost, total)


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp64 as a sum of two numbers of 26 bits, whose products are exact."""
    high = x * 134217729.0
    high = high - (high - x)
    return high, x - high
