"""Philox4x32-10, the counter-based generator behind every mask and every noise value.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

The contract, which ``fastreg/random.py`` states in PyTorch and these functions equal bit for bit:

    key      = seed (64 bits)                counter = (block index, offset) (64 bits each)
    uniform  : element i is lane i % 8 of block i // 8, eight 16-bit lanes a block, low half of a word first
    normal   : element i is value i % 4 of block i // 4, two Box-Muller pairs a block
    in rows  : both, with block (column // 8 or // 4, row) of two words of 32 bits

A number depends on seed, offset and element index alone, whatever the tile, the dtype or the GPU.

Cost (sm_90, a 16-bit lane): a round is two widening multiplies (``IMAD.WIDE.U32``) and two three-input XORs
(``LOP3``), the key schedule is uniform over the warp; 10 rounds / 8 lanes = 2.5 + 2.5 instructions a lane.
``tl.philox`` asks for the high and the low half of each product in separate instructions, and ``tl.rand``
throws three of its four words away: about 60 instructions an element.
"""

import triton
import triton.language as tl

from .fastmath import cos, log2, sin, sqrt

ROUNDS = tl.constexpr(10)
MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def low_word(x):
    return x.to(tl.uint64).to(tl.uint32)


@triton.jit
def high_word(x):
    return (x.to(tl.uint64) >> 32).to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """The bijection itself: counter and key are words of 32 bits, uint32, the counter's four of one shape."""
    for _ in tl.static_range(ROUNDS):
        # Widened first, a 32x32 multiply is one instruction for both halves of the product.
        product_0 = c0.to(tl.uint64) * MULTIPLIER_0
        product_1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0 = high_word(product_1) ^ c1 ^ k0
        c2 = high_word(product_0) ^ c3 ^ k1
        c1 = low_word(product_1)
        c3 = low_word(product_0)
        k0 += WEYL_0
        k1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def philox(block, seed, offset):
    """Four words of 32 random bits for each block index.

    block: int64 or (cheaper) non-negative int32, any shape.  seed, offset: int64 scalars.
    Returns four uint32 tensors shaped as ``block``.
    """
    c0 = low_word(block)
    c1 = tl.zeros_like(c0) if block.dtype == tl.int32 else high_word(block)
    c2 = tl.zeros_like(c0) + low_word(offset)
    c3 = tl.zeros_like(c0) + high_word(offset)
    return philox4x32(c0, c1, c2, c3, low_word(seed), high_word(seed))


@triton.jit
def _two_lanes(word):
    """A word as its two 16-bit lanes, each in the HIGH half of a word of its own.

    The lower half of the result is not cleared: ``lane >= (t << 16)`` compares the 16-bit lane with ``t``
    exactly whatever lies below, which saves a mask or a shift an element.
    """
    return tl.join(word << 16, word)


@triton.jit
def _word(index, seed, offset):
    """The random word of a pair of elements."""
    r0, r1, r2, r3 = philox(index >> 2, seed, offset)
    first_half = (index & 2) == 0
    return tl.where((index & 1) == 0, tl.where(first_half, r0, r2), tl.where(first_half, r1, r3))


@triton.jit
def lanes(vector, seed, offset, VECTOR: tl.constexpr):
    """The 16-bit lanes of VECTOR consecutive elements, each in the high half of a uint32.

    vector: index (int64 or int32) of a group of VECTOR elements (element index // VECTOR), any shape.
    VECTOR: 8, 4, 2 or 1.  Returns shape [*vector.shape, ...] with VECTOR values in the joined minor dimensions,
    in element order: reshape it to the tile.

    VECTOR is the width of a thread's memory access (eight 16-bit, four 32-bit, two 64-bit values), so the
    lanes are born in the thread that loads the elements: no shuffle, no shared memory. Where a vector is
    narrower than Philox's eight lanes, neighbouring threads run the same block and keep their part: twice
    the arithmetic is cheaper than the exchange, and the mask is the same for every dtype.
    """
    if VECTOR == 8:
        r0, r1, r2, r3 = philox(vector, seed, offset)
        return _two_lanes(tl.join(tl.join(r0, r2), tl.join(r1, r3)))
    elif VECTOR == 4:
        r0, r1, r2, r3 = philox(vector >> 1, seed, offset)
        first = (vector & 1) == 0
        return _two_lanes(tl.join(tl.where(first, r0, r2), tl.where(first, r1, r3)))
    elif VECTOR == 2:
        return _two_lanes(_word(vector, seed, offset))
    else:
        word = _word(vector >> 1, seed, offset)
        return tl.where((vector & 1) == 0, word << 16, word)


@triton.jit
def box_muller(radius_word, angle_word):
    """Two independent standard normals (fp32) from two random words. Box and Muller (1958).

    The uniform (word + 1/2) / 2^32 is never 0, so the largest magnitude is sqrt(66 ln 2) = 6.76; the angle
    is the word read as a signed number times pi / 2^31, inside [-pi, pi] where sin and cos are accurate.
    """
    uniform = tl.fma(radius_word.to(tl.float32), 2.0**-32, 2.0**-33)
    radius = sqrt(log2(uniform) * -1.3862943611198906)  # -2 ln 2
    angle = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # pi / 2^31
    return radius * cos(angle), radius * sin(angle)


@triton.jit
def normals(vector, seed, offset):
    """Four standard normals for each group of four elements: shape [*vector.shape, 2, 2] in element order."""
    r0, r1, r2, r3 = philox(vector, seed, offset)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def row_words(row, block, seed, offset, use):
    """The four words of block (block, row), ``use`` streams further on: what starts anew in each row of a matrix."""
    none = tl.zeros_like(row + block).to(tl.uint32)
    return philox4x32(
        none + block.to(tl.uint32),
        none + row.to(tl.uint32),
        none + low_word(offset),
        none + high_word(offset) + use,
        low_word(seed),
        high_word(seed),
    )


@triton.jit
def row_normals(row, first, seed, offset, use, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Standard normals [ROWS, COLUMNS] of rows ``row`` and the columns from ``first`` on, a multiple of 4."""
    block = first // 4 + tl.arange(0, COLUMNS // 4)
    r0, r1, r2, r3 = row_words(row[:, None], block[None, :], seed, offset, use)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [ROWS, COLUMNS])


@triton.jit(do_not_specialize=["seed", "offset"])
def fill_lanes(
    out_ptr,  # int32 [numel]
    seed: tl.int64,
    offset: tl.int64,
    numel,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The uniform stream itself, one 16-bit lane an element: 4 bytes written an element."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    vector = first // VECTOR + tl.arange(0, BLOCK // VECTOR)
    values = tl.reshape(lanes(vector, seed, offset, VECTOR), [BLOCK]) >> 16
    element = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + element, values.to(tl.int32), mask=element < numel)


@triton.jit(do_not_specialize=["seed", "offset"])
def fill_normals(
    out_ptr,  # fp64, fp32, fp16 or bf16 [numel]
    seed: tl.int64,
    offset: tl.int64,
    numel,
    BLOCK: tl.constexpr,
):
    """The normal stream itself. Cost: e bytes written an element, about 30 instructions each."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    vector = first // 4 + tl.arange(0, BLOCK // 4)
    values = tl.reshape(normals(vector, seed, offset), [BLOCK])
    element = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + element, values.to(out_ptr.dtype.element_ty), mask=element < numel)
