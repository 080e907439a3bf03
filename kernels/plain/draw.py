"""Random numbers by position, straight from the contract (``fastreg/random.py``): a call of Philox for each element."""

import triton
import triton.language as tl


@triton.jit
def _word(index, position, seed, offset):
    """Word ``index`` (0 to 3) of the block ``position``."""
    block = position.to(tl.uint64)
    high = (offset >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        seed,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        tl.zeros_like(block).to(tl.uint32) + offset.to(tl.uint32),
        tl.zeros_like(block).to(tl.uint32) + high,
    )
    return tl.where(index < 2, tl.where(index == 0, r0, r1), tl.where(index == 2, r2, r3))


@triton.jit
def lane(element, seed, offset):
    """16 uniform bits for each element: lane i % 8 of block i // 8, low halves first."""
    word = _word(element % 8 // 2, element // 8, seed, offset)
    return (word >> (element % 2 * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def normal(element, seed, offset):
    """A standard normal for each element: value i % 4 of block i // 4. Box and Muller (1958)."""
    pair = element % 4 // 2 * 2
    radius_word = _word(pair, element // 4, seed, offset)
    angle_word = _word(pair + 1, element // 4, seed, offset)
    radius = tl.sqrt(-2.0 * tl.log((radius_word.to(tl.float32) + 0.5) / 4294967296.0))
    angle = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # pi / 2^31
    return radius * tl.where(element % 2 == 0, tl.cos(angle), tl.sin(angle))
