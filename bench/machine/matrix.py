"""Where the elements of matrices lie: in the registers of a warp, and in shared memory.

The products themselves are sums in fp64, rounded to fp32 once an instruction. A GPU adds the terms in an order and with
a number of bits that the ISA leaves open.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy import float32, float64, int64, ndarray, uint16, uint32, uint64

from .arithmetic import bf16_to_f32, halves
from .races import WARP

_LANE = np.arange(WARP)
GROUP, PLACE = _LANE // 4, _LANE % 4  # eight groups of four lanes


def sizes(shape: str) -> tuple[int, int, int]:
    """Rows, columns and terms: (64, 16, 8) of m64n16k8."""
    return tuple(map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups()))


def values(bits: ndarray, kind: str) -> ndarray:
    """The elements as fp64."""
    if kind == "bf16":
        return bf16_to_f32(bits).astype(float64)
    if kind == "f16":
        return bits.view(np.float16).astype(float64)
    return (bits & uint32(0xFFFFE000)).view(float32).astype(float64)  # tf32: the lower bits are not read


def _elements(registers: Sequence[ndarray], kind: str) -> list[ndarray]:
    """Those of each register, the lower half first."""
    if kind in ("bf16", "f16"):
        return [values(np.ascontiguousarray(half), kind) for x in registers for half in halves(x)]
    return [
        np.ascontiguousarray(x) if kind == "f64" else values(np.ascontiguousarray(x), kind) for x in registers
    ]


# -----------------------------------------------------------------------------------------------------------
# mma.sync


def left(registers: Sequence[ndarray], kind: str) -> ndarray:
    """A [.., rows, terms] from registers [.., 32]."""
    parts = _elements(registers, kind)
    if kind == "f64":
        result = np.zeros((*parts[0].shape[:-1], 8, 4))
        result[..., GROUP, PLACE] = parts[0]
        return result
    packed = 2 if kind in ("bf16", "f16") else 1
    half = 4 * packed  # terms of four lanes
    result = np.zeros((*parts[0].shape[:-1], 16, len(registers) // 2 * half))
    for number, part in enumerate(parts):
        register, element = divmod(number, packed)
        result[..., GROUP + 8 * (register % 2), PLACE * packed + element + half * (register // 2)] = part
    return result


def right(registers: Sequence[ndarray], kind: str) -> ndarray:
    """B [.., terms, 8] from registers [.., 32]."""
    parts = _elements(registers, kind)
    packed = 2 if kind in ("bf16", "f16") else 1
    result = np.zeros((*parts[0].shape[:-1], len(registers) * 4 * packed, 8))
    for number, part in enumerate(parts):
        register, element = divmod(number, packed)
        result[..., PLACE * packed + element + 4 * packed * register, GROUP] = part
    return result


_SHAPES = {
    ("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "tf32"),
    ("m16n8k4", "tf32"), ("m8n8k4", "f64"),
}  # fmt: skip


def product(
    shape: str, kind: str, a: Sequence[ndarray], b: Sequence[ndarray], c: Sequence[ndarray]
) -> list[ndarray]:
    """mma.sync of registers [.., 32]."""
    if (shape, kind) not in _SHAPES:
        raise NotImplementedError(f"mma {shape} of {kind}")
    found = left(a, kind) @ right(b, kind)
    result = []
    for number, addend in enumerate(c):
        part = found[..., GROUP + 8 * (number // 2), PLACE * 2 + number % 2]
        result.append((part + addend).astype(addend.dtype))
    return result


# -----------------------------------------------------------------------------------------------------------
# ldmatrix, stmatrix


def fragments(elements: ndarray, transposed: bool) -> ndarray:
    """Matrices [.., 8, 8] of 16 bits to registers [.., 32]: lane l has elements 2 (l % 4) and the next of row l / 4."""
    matrix = elements.swapaxes(-1, -2) if transposed else elements
    low, high = matrix[..., GROUP, PLACE * 2].astype(uint32), matrix[..., GROUP, PLACE * 2 + 1].astype(uint32)
    return low | high << uint32(16)


def rows(registers: ndarray, transposed: bool) -> ndarray:
    """The opposite."""
    result = np.zeros((*registers.shape[:-1], 8, 8), uint16)
    for element, half in enumerate(halves(registers)):
        result[..., GROUP, PLACE * 2 + element] = half
    return result.swapaxes(-1, -2) if transposed else result


# -----------------------------------------------------------------------------------------------------------
# wgmma


def left_of_registers(registers: Sequence[ndarray], kind: str) -> ndarray:
    """A [.., 64, terms] from registers [.., 4 warps, 32]."""
    found = left(registers, kind)
    return found.reshape(*found.shape[:-3], 64, found.shape[-1])


def of_accumulators(matrix: ndarray, shape: tuple[int, int]) -> list[ndarray]:
    """[programs, warpgroups, 64, columns] to registers [programs, threads]."""
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    return [
        matrix[..., row + 8 * (i // 2 % 2), column + 8 * (i // 4) + i % 2].reshape(shape)
        for i in range(matrix.shape[-1] // 2)
    ]


_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a line, by the two top bits of a descriptor


def addresses(descriptor: ndarray, lines: int, depth: int, width: int, along_depth: bool) -> ndarray:
    """The addresses of the elements [.., lines, depth] of a matrix in shared memory. along_depth: neighbours in depth
    are neighbours in memory ("K-major").

    Memory is divided into tiles of eight lines of 16, 32, 64 or 128 bytes, in which units of 16 bytes are swizzled: the
    bits of their number are xored with those of the line, taken from the address itself.
    """
    d = descriptor[..., None, None]
    start, leading, stride = (((d >> uint64(at)) & uint64(0x3FFF)).astype(int64) << 4 for at in (0, 16, 32))
    if ((d >> uint64(49)) & uint64(7)).any():
        raise NotImplementedError("a tile that does not begin at a multiple of its size")
    swizzle = (d >> uint64(62)).astype(int64)
    if (swizzle != swizzle.ravel()[0]).any():
        raise NotImplementedError("several swizzles at once")
    line = _SWIZZLES[int(swizzle.ravel()[0])]
    n, k = np.arange(lines)[:, None], np.arange(depth)[None, :]
    along, across = (k, n) if along_depth else (n, k)
    unit, byte = along * width // line, along * width % line
    inside = byte + across % 8 * line
    if line == 16 and not along_depth:
        leading, stride = stride, leading
    linear = start + inside + across // 8 * stride + unit * leading
    return linear ^ (linear >> 3 & (line - 16))
