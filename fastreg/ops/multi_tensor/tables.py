"""Many tensors in one launch: the tables that tell programs where their elements are (``kernels/multi_tensor.py``).

A table is built once, and holds numbers only: no reference to a tensor. Whoever keeps it has to see that the tensors
still lie where they lay, and to ``move`` a list whose addresses have changed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.layout import is_dense

if backend.HAS_TRITON:
    import triton.language as tl


def type_of(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def taken(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether kernels find the elements of each tensor by its address. (In torch.compile there is no address.)"""
    if torch.compiler.is_compiling():
        return [False] * len(tensors)
    answers: dict[tuple, bool] = {}  # one a kind: the question takes longer than the launch
    found = []
    for x in tensors:
        kind = type(x), x.dtype, x.device, x.layout
        if kind not in answers:
            answers[kind] = backend.runs_kernels(x)
        found.append(answers[kind] and is_dense(x))
    return found


def deal(lengths: np.ndarray, sizes: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts units of ``lengths`` into chunks of ``sizes`` elements: the unit of each chunk, and its start there."""
    counts = -(-lengths // sizes)
    unit = np.repeat(np.arange(len(lengths)), counts)
    place = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
    return unit, place * np.broadcast_to(sizes, lengths.shape)[unit]


def deal_rows(
    rows: np.ndarray, counts: np.ndarray, size: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """Cuts each of ``counts[t]`` rows of ``rows[t]`` elements of tensor t into chunks, which are of one row.

    Returns the chunks (tensor, first element, end), the row of each, and how many chunks each row has.
    """
    tensor = np.repeat(np.arange(len(rows)), counts)
    place = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = rows[tensor]
    row, start = deal(lengths, size)
    begin = (place * lengths)[row]
    chunks = tensor[row], begin + start, np.minimum(begin + start + size, begin + lengths[row])
    return chunks, row, -(-lengths // size)


def upload(numbers: np.ndarray | Sequence, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor on the device, without waiting for it.

    In a CUDA graph it is written at every replay, from pinned memory that torch gives to no one else once it was
    allocated and read while a graph was recorded.
    """
    tensor = torch.from_numpy(np.asarray(numbers)).to(dtype)
    if device.type != "cuda":
        return tensor.clone() if device.type == "cpu" else tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Table:
    """entries: int64 ``[rows, tensors]`` on the device; chunks: int64 ``[2, programs]``: tensor and first element,
    or with a third row, the end."""

    def __init__(
        self, rows: Sequence[Sequence[int] | np.ndarray], chunks: Sequence[np.ndarray], device: torch.device
    ):
        self.device = device
        self.entries = upload(np.array(rows, dtype=np.int64), device)
        self.chunks = upload(np.stack(chunks), device)

    @property
    def tensors(self) -> int:
        return self.entries.shape[1]

    @property
    def programs(self) -> int:
        return self.chunks.shape[1]

    def move(self, row: int, addresses: np.ndarray) -> None:
        """Writes the new addresses of a list. In a CUDA graph every replay writes these, as with ``upload``."""
        numbers = torch.from_numpy(np.array(addresses, dtype=np.int64))
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        self.entries[row].copy_(numbers, non_blocking=True)


def kept_by_stream(build: Callable) -> Callable:
    """Of ``build(device, *numbers)``, which uploads: keeps the latest results, for the stream they were uploaded on.

    All that is in them follows from the numbers, addresses among them, so that they never become wrong. While a CUDA
    graph is recorded they are built anew: its replays upload them themselves.
    """
    kept = functools.lru_cache(maxsize=64)(lambda stream, *arguments: build(*arguments))

    @functools.wraps(build)
    def found(device: torch.device, *numbers: Any) -> Any:
        if device.type != "cuda":
            return kept(0, device, *numbers)
        if backend.recording():
            return build(device, *numbers)
        return kept(torch.cuda.current_stream(device).cuda_stream, device, *numbers)

    return found


@kept_by_stream
def table_of(device: torch.device, rows: tuple[tuple[int, ...], ...], sizes: tuple[int, ...] | int) -> Table:
    """A table with these rows, the second of them the lengths that are cut into chunks of ``sizes``."""
    return Table(rows, deal(np.array(rows[1], dtype=np.int64), np.array(sizes, dtype=np.int64)), device)
