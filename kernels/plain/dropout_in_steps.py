"""Dropout from the plain kernel to the tuned one: each kernel changes one thing in the one before it.

``python -m bench lesson`` compiles them and counts their machine code; ``kernels/README.md`` has the table. Step 0 is
``dropout.py`` in this folder, step 4 is step 3 with larger tiles, and the last step is ``kernels/dropout.py``. All draw
the same mask.
"""

import triton
import triton.language as tl

from ..philox import low_word, philox
from .draw import lane


@triton.jit
def tiled(x_ptr, y_ptr, seed: tl.int64, threshold, scale: tl.float32, size, BLOCK: tl.constexpr):
    """1. The tensor is one row, and indices have 32 bits. Grid: (blocks,)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    keep = lane(element, seed, tl.full([], 0, tl.int64)) >= threshold
    tl.store(y_ptr + element, tl.where(keep, x * scale, 0.0), mask=element < size)


@triton.jit
def _two_lanes(word):
    return tl.join(word & 0xFFFF, word >> 16)


@triton.jit
def shared_calls(x_ptr, y_ptr, seed: tl.int64, threshold, scale: tl.float32, size, BLOCK: tl.constexpr):
    """2. One call of Philox serves the eight elements that a thread loads at once."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    vector = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    none = tl.zeros_like(vector).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, vector.to(tl.uint32), none, none, none)
    lanes = tl.reshape(_two_lanes(tl.join(tl.join(r0, r2), tl.join(r1, r3))), [BLOCK])
    tl.store(y_ptr + element, tl.where(lanes >= threshold, x * scale, 0.0), mask=element < size)


@triton.jit
def wide_products(x_ptr, y_ptr, seed: tl.int64, threshold, scale: tl.float32, size, BLOCK: tl.constexpr):
    """3. Both halves of a product come from one multiplication of 64 bits (``philox.philox4x32``)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    vector = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    r0, r1, r2, r3 = philox(vector, seed, tl.full([], 0, tl.int64))
    lanes = tl.reshape(_two_lanes(tl.join(tl.join(r0, r2), tl.join(r1, r3))), [BLOCK])
    tl.store(y_ptr + element, tl.where(lanes >= threshold, x * scale, 0.0), mask=element < size)


@triton.jit
def lanes_in_place(x_ptr, y_ptr, seed: tl.int64, threshold, scale: tl.float32, size, BLOCK: tl.constexpr):
    """5. A lane is compared in the upper half of its word: whatever lies below, the order is the same."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    vector = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    r0, r1, r2, r3 = philox(vector, seed, tl.full([], 0, tl.int64))
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    lanes = tl.reshape(tl.join(words << 16, words), [BLOCK])
    keep = lanes >= (low_word(threshold) << 16)
    tl.store(y_ptr + element, tl.where(keep, x * scale, 0.0), mask=element < size)


@triton.jit
def selected_first(x_ptr, y_ptr, seed: tl.int64, threshold, scale: tl.float32, size, BLOCK: tl.constexpr):
    """6. x is selected before it is scaled, in fp32: behind the product LLVM would select in 16 bits."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < size, other=0.0).to(tl.float32)
    vector = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    r0, r1, r2, r3 = philox(vector, seed, tl.full([], 0, tl.int64))
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    lanes = tl.reshape(tl.join(words << 16, words), [BLOCK])
    keep = lanes >= (low_word(threshold) << 16)
    tl.store(y_ptr + element, tl.where(keep, x, 0.0) * scale, mask=element < size)


@triton.jit
def full_tiles(x_ptr, y_ptr, seed: tl.int64, threshold, scale: tl.float32, BLOCK: tl.constexpr):
    """7. The tensor is whole tiles: nothing is compared with its end. (The tuned kernel has both forms.)"""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element).to(tl.float32)
    vector = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    r0, r1, r2, r3 = philox(vector, seed, tl.full([], 0, tl.int64))
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    lanes = tl.reshape(tl.join(words << 16, words), [BLOCK])
    keep = lanes >= (low_word(threshold) << 16)
    tl.store(y_ptr + element, tl.where(keep, x, 0.0) * scale)
