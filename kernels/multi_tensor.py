"""Many tensors in one launch: how a program of the kernels of optimizers, penalties and averages finds its elements.

The tensors lie anywhere. Two tables in the memory of the device say where, written by ``fastreg/ops/multi_tensor.py``:

    entries  int64 [lists + 2, tensors]   a row of addresses for each list of tensors (parameters, gradients, ...),
                                          then the number of elements of each tensor, and the length of its rows
    chunks   int64 [2 or 3, programs]     which tensor a program works on, the element it starts at, and where it ends

Cost: a program reads 16 or 24 bytes of chunks and 8 a list, against BLOCK elements of each: 0.05 bytes an element, most
of them from the L2 cache. What it costs is time: two dependent reads before the first element. Enough programs are
resident on a multiprocessor to hide them.

An address is a number to the compiler: whether 16-byte accesses reach it has to be asked at run time. Allocations of
torch are aligned, views of a bucket (DDP, FSDP2) or of a user are not. So each program judges the addresses it has
loaded (``aligned``), and a full tile at aligned addresses takes the path without masks. The hint has to come after the
cast to a pointer, or it is lost.
"""

import triton
import triton.language as tl

from .fastmath import upcast


@triton.jit
def chunk(chunks_ptr, programs):
    """The tensor of this program and its first element there: two int64 scalars."""
    program = tl.program_id(0)
    return tl.load(chunks_ptr + program), tl.load(chunks_ptr + programs + program)


@triton.jit
def chunk_end(chunks_ptr, programs):
    """The element behind the last of this program, where the chunks have such a row."""
    return tl.load(chunks_ptr + 2 * programs + tl.program_id(0))


@triton.jit
def entry(entries_ptr, tensors, tensor, ROW: tl.constexpr):
    """An int64 scalar of the table of entries."""
    return tl.load(entries_ptr + ROW * tensors + tensor)


@triton.jit
def aligned(addresses):
    """Whether 16-byte accesses reach all the addresses that were joined by | into one number."""
    return (addresses & 15) == 0


@triton.jit
def elements(first, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """The elements of a tile. A product, so that the compiler sees what divides it: a hint on an argument is lost.
    (Its mask is the caller's, as a function of Triton 3.6 cannot return None.)"""
    return (first // VECTOR * VECTOR if ALIGNED else first) + tl.arange(0, BLOCK)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def read(address, element, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, OTHER: tl.constexpr = None):
    """The elements at the int64 offsets ``element``, fp32 (fp64 where they are). mask: None where all are inside;
    OTHER: what stands for the others."""
    return upcast(tl.load(_pointer(address, DTYPE, ALIGNED) + element, mask=mask, other=OTHER))


@triton.jit
def write(address, element, values, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    tl.store(_pointer(address, DTYPE, ALIGNED) + element, values.to(DTYPE), mask=mask)
