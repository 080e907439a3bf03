"""Averages and snapshots of weights: many tensors in one launch.

    follow   a + weight (p - a): an exponential moving average with weight = 1 - decay
    copy_if  source to target, where a flag in the memory of the device says so

``follow`` reads a and p and writes a: 12 bytes a weight of fp32, the floor. What is equal stays equal to the bit,
infinities included (masks among the buffers). ``copy_if`` reads and writes: 8 bytes a weight; where the flag is down,
a program reads that and ends. It copies bytes, so that tensors of every dtype go in one launch.

Arithmetic (sm_90) is 12 instructions a weight, where the memory of an H100 (3 TB/s) leaves time for 108 at 12 bytes. A
program takes one tile of one tensor; a tail, or a tile that 16-byte accesses do not reach, is done in a loop over
pieces of one element a thread.

The plain twin is plain/averages.py, with a launch for each tensor. Here one launch takes all tensors of a model, by a
table of addresses.
"""

import triton
import triton.language as tl

from .fastmath import bound
from .multi_tensor import aligned, chunk, elements, entry, read, write

# The rows of the table of entries.
TARGET = tl.constexpr(0)
NUMEL = tl.constexpr(1)  # of copy_if: bytes
SOURCE = tl.constexpr(2)


@triton.jit
def _follow_tile(
    target, source, first, limit, weight,
    A: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    element = elements(first, BLOCK, VECTOR, ALIGNED)
    mask = None if ALIGNED else element < limit
    a = read(target, element, mask, A, ALIGNED)
    p = read(source, element, mask, P, ALIGNED)
    a = tl.where(a == p, a, a + weight * (p - a))
    write(target, element, a, mask, A, ALIGNED)


@triton.jit(do_not_specialize=["tensors", "programs"])
def follow(
    entries_ptr,  # int64 [3, tensors]
    chunks_ptr,  # int64 [2, programs]
    weight: tl.float64,
    tensors,
    programs,
    A: tl.constexpr,  # dtypes of averages and weights
    P: tl.constexpr,
    COMPUTE: tl.constexpr,  # fp32, or fp64
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of the narrower of these types in 16 bytes
):
    """One tile a program. Grid: (programs,)."""
    tensor, first = chunk(chunks_ptr, programs)
    limit = entry(entries_ptr, tensors, tensor, NUMEL)
    target = entry(entries_ptr, tensors, tensor, TARGET)
    source = entry(entries_ptr, tensors, tensor, SOURCE)
    weight = tl.full([], weight, COMPUTE)  # it came as fp64
    if aligned(target | source) & (first + BLOCK <= limit):
        _follow_tile(target, source, first, limit, weight, A, P, BLOCK, VECTOR, True)
    else:
        PIECE: tl.constexpr = BLOCK // 16
        count = tl.minimum(first + BLOCK, limit) - first
        for start in range(0, bound(count.to(tl.int32)), PIECE):
            _follow_tile(target, source, first + start, limit, weight, A, P, PIECE, VECTOR, False)


@triton.jit(do_not_specialize=["tensors", "programs"])
def copy_if(
    entries_ptr,  # int64 [3, tensors]
    chunks_ptr,  # int64 [2, programs]
    flag_ptr,  # bool [1], or None: always
    tensors,
    programs,
    BLOCK: tl.constexpr,  # bytes
):
    """One tile a program. Grid: (programs,)."""
    if flag_ptr is None or tl.load(flag_ptr) != 0:
        tensor, first = chunk(chunks_ptr, programs)
        limit = entry(entries_ptr, tensors, tensor, NUMEL)
        target = entry(entries_ptr, tensors, tensor, TARGET)
        source = entry(entries_ptr, tensors, tensor, SOURCE)
        if aligned(target | source) & (first + BLOCK <= limit):
            word = tl.arange(0, BLOCK // 4)
            words = tl.multiple_of((source + first // 16 * 16).to(tl.pointer_type(tl.int32)), 16)
            into = tl.multiple_of((target + first // 16 * 16).to(tl.pointer_type(tl.int32)), 16)
            tl.store(into + word, tl.load(words + word))
        else:
            PIECE: tl.constexpr = BLOCK // 64
            count = tl.minimum(first + BLOCK, limit) - first
            for start in range(0, bound(count.to(tl.int32)), PIECE):
                byte = first + start + tl.arange(0, PIECE)
                found = tl.load(source.to(tl.pointer_type(tl.uint8)) + byte, mask=byte < limit)
                tl.store(target.to(tl.pointer_type(tl.uint8)) + byte, found, mask=byte < limit)
