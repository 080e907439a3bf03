"""The random numbers of fastreg, stated in PyTorch: what every mask and every noise value must equal.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
A stream is named by a 64-bit ``seed``, the key, and a 64-bit ``offset``, the upper half of the counter; the lower
half counts blocks of elements. Element i of a tensor is the i-th in dense memory order. It receives

    uniform   the 16-bit lane i % 8 of block i // 8 (a block's four words, low halves first)
    normal    value i % 4 of block i // 4: words (0, 1) and (2, 3) give two Box-Muller pairs

so a random number depends on seed, offset and element alone, not on device, dtype, tile or kernel. Dropout drops
where lane < t, t = round(p 2^16), and scales what it keeps by 2^16 / (2^16 - t): the mean is exact for the
probability applied, which differs from p by at most 2^-17.

A connection (example, output n, input k) of DropConnect receives a bit for each binary digit of its probability:
that of its example in the 16-bit lane k % 8 of block (k // 8, n), see ``connection_lanes``. Where an element is drawn
many times, four draws of it are the normals of its block, see ``draws``. Where noise belongs to the rows of a matrix,
they start anew in each: see ``row_normals`` and ``signs``.

The Triton kernels (``kernels/philox.py``) equal this file bit for bit, normals up to the rounding of log, sin, cos.
"""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor
from torch._functorch import config
from torch.fx import traceback
from torch.types import Device
from torch.utils.checkpoint import checkpoint

from fastreg.ops import backend
from fastreg.ops.arguments import is_integer, plain

LANE_VALUES = 1 << 16

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


class Stream(NamedTuple):
    """The name of a random stream: what a kernel needs to draw a mask, and the backward pass to draw it again.

    seed: an int, or an int64 tensor of one element on the device of the data (CUDA graphs, torch.compile).
    offset: an int.
    """

    seed: int | Tensor
    offset: int = 0

    def seed_on(self, device: torch.device) -> Tensor:
        """The seed as an operator of ``torch.compile`` takes it."""
        if isinstance(self.seed, Tensor):
            return self.seed
        return torch.full((1,), self.seed, dtype=torch.int64, device=device)


def philox4x32(
    counter: Sequence[int | Tensor], key: Sequence[int | Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox4x32 bijection on 32-bit words held in int64 tensors (or ints) of any one shape.

    Args:
        counter: four words, each an int64 tensor with values in [0, 2^32), broadcast together.
        key: two words.
        rounds: 10 is the published recommendation.

    Returns: four words of random bits.
    """
    c0, c1, c2, c3, k0, k1 = cast("list[Tensor]", [*counter, *key])
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, so they hold all 64 bits of the unsigned product.
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product_1 >> 32 & _WORD) ^ c1 ^ k0,
            product_1 & _WORD,
            (product_0 >> 32 & _WORD) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0 = (k0 + _WEYL[0]) & _WORD
        k1 = (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _places(count: int, device: Device) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device=device)


def words(block: Tensor, stream: Stream) -> Tensor:
    """The four random words of each block: int64 ``[*block.shape, 4]`` with values in [0, 2^32)."""
    seed, offset = stream
    counter = (block & _WORD, block >> 32 & _WORD, offset & _WORD, offset >> 32 & _WORD)
    return torch.stack(
        torch.broadcast_tensors(*philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))), dim=-1
    )


def lanes(element: Tensor, stream: Stream) -> Tensor:
    """The 16-bit lane of each element index (int64, any shape): int64 in [0, 2^16)."""
    word = words(element >> 3, stream).gather(-1, (element >> 1 & 3).unsqueeze(-1)).squeeze(-1)
    return word >> (element & 1) * 16 & 0xFFFF


def threshold(p: float) -> int:
    """The t for which dropping where lane < t is closest to probability ``p``: round(p 2^16)."""
    return round(p * LANE_VALUES)


def keep_mask(size: Sequence[int], p: float, stream: Stream, device: Device = None) -> Tensor:
    """The dropout mask of a contiguous tensor: bool, True where an element is kept (probability 1 - p)."""
    count = math.prod(size)
    first_block = _places((count + 7) // 8, device)
    bits = words(first_block, stream)
    drawn = torch.stack((bits & 0xFFFF, bits >> 16), dim=-1).flatten()[:count]
    return (drawn >= threshold(p)).view(size)


class Chance(NamedTuple):
    """A probability of keeping, keep / 2^digits. It takes a random bit a digit to decide with it."""

    keep: int
    digits: int

    @property
    def probability(self) -> float:
        return self.keep / 2**self.digits


EXAMPLES_PER_LANE = 16
"""A connection's lane has a bit for each of so many examples (or groups of them)."""


def chance(p: float) -> Chance:
    """The chance closest to keeping with probability 1 - ``p`` in 8 digits, or in as many more (16 at most) as give
    the smaller of p and 1 - p four significant ones. One half takes one digit."""
    smaller = min(p, 1 - p)
    digits = min(16, max(8, math.ceil(-math.log2(smaller)) + 4)) if smaller > 0 else 0
    keep = round((1 - p) * 2**digits)
    while digits and keep % 2 == 0:
        keep, digits = keep // 2, digits - 1
    return Chance(keep, digits)


def connection_lanes(
    word: int,
    outputs: int,
    inputs: int,
    chance: Chance,
    stream: Stream,
    device: Device = None,
    first: int = 0,
) -> Tensor:
    """Which connections are kept, for 16 examples: int16 ``[outputs, inputs]``, from output ``first`` on.

    Bit 15 - i is 1 where example 16 ``word`` + i keeps the connection. Digit d of the probability (0 the last) has
    lanes of its own: those of block (k // 8, n) under an offset whose upper half is increased by word + d 2^28. The
    digits are read from the last to the first, as in Horner's scheme: a 1 halves the chance of dropping (or), a 0
    that of keeping (and).
    """
    seed, offset = stream
    block = (_places(outputs, device)[:, None] + first) << 32 | _places((inputs + 7) // 8, device)
    for digit in range(chance.digits):
        bits = words(block, Stream(seed, offset + (word + (digit << 28) << 32)))
        if digit == 0:
            kept = bits  # the last digit is a 1
        elif chance.keep >> digit & 1:
            kept |= bits
        else:
            kept &= bits
    halves = torch.stack((kept & 0xFFFF, kept >> 16), dim=-1).flatten(1)[:, :inputs]
    return halves.to(torch.int16)


def connection_mask(example: Tensor, outputs: int, inputs: int, chance: Chance, stream: Stream) -> Tensor:
    """Which connections the given examples (int64 ``[B]``, or groups) keep: bool ``[B, outputs, inputs]``."""
    masks = []
    for index in example.tolist():
        word, bit = divmod(index, EXAMPLES_PER_LANE)
        lanes = connection_lanes(word, outputs, inputs, chance, stream, example.device)
        masks.append(lanes << bit < 0)
    empty = torch.zeros(0, outputs, inputs, dtype=torch.bool, device=example.device)
    return torch.stack(masks) if masks else empty


def normal(
    size: Sequence[int], stream: Stream, *, dtype: torch.dtype = torch.float32, device: Device = None
) -> Tensor:
    """Standard normals by the transform of Box and Muller (1958), computed in fp64 and rounded to ``dtype``."""
    count = math.prod(size)
    bits = words(_places((count + 3) // 4, device), stream)
    return _box_muller(bits).flatten()[:count].view(size).to(dtype)


def _box_muller(bits: Tensor) -> Tensor:
    """Four normals, fp64, of four words."""
    uniform = (bits[..., 0::2].double() + 0.5) / 2**32
    angle_word = bits[..., 1::2]
    angle = torch.where(angle_word < 2**31, angle_word, angle_word - 2**32).double() * (math.pi / 2**31)
    radius = (-2 * uniform.log()).sqrt()
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def _blocks_of_rows(rows: int, columns: int, stream: Stream, width: int, device: Device) -> Tensor:
    """The words of the blocks (column // width, row), for what has to start anew in each row."""
    block = _places((columns + width - 1) // width, device)
    return words(_places(rows, device)[:, None] << 32 | block, stream)


def row_normals(
    rows: int, columns: int, stream: Stream, *, dtype: torch.dtype = torch.float32, device: Device = None
) -> Tensor:
    """Standard normals ``[rows, columns]``: value k % 4 of block (k // 4, row)."""
    bits = _blocks_of_rows(rows, columns, stream, 4, device)
    return _box_muller(bits).flatten(1)[:, :columns].to(dtype)


def signs(
    rows: int, columns: int, stream: Stream, *, dtype: torch.dtype = torch.float32, device: Device = None
) -> Tensor:
    """1 or -1 ``[rows, columns]``: -1 where the highest bit of lane k % 8 of block (k // 8, row) is 1."""
    bits = _blocks_of_rows(rows, columns, stream, 8, device)
    drawn = torch.stack((bits >> 15 & 1, bits >> 31), dim=-1).flatten(1)[:, :columns]
    return (1 - 2 * drawn).to(dtype)


DRAWS = 4
"""Draws of an element that share a stream."""


def draws(
    size: Sequence[int],
    quad: int,
    stream: Stream,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> Tensor:
    """Draws 4 ``quad`` to 4 ``quad`` + 3 for every element of a tensor, ``[*size, 4]``.

    They are the :func:`normal` values of a tensor of that shape, under an offset whose upper half is increased by
    ``quad``.
    """
    seed, offset = stream
    return normal((*size, DRAWS), Stream(seed, offset + (quad << 32)), dtype=dtype, device=device)


STEP = 4
"""Between the offsets of two operations: torch counts them in fours."""

_lock = threading.Lock()


def stream(
    device: torch.device, seed: int | Tensor | None = None, generator: Generator | None = None
) -> Stream:
    """The stream of one random operation on ``device``.

    An explicit ``seed`` (an int, or an int64 tensor of one element on ``device``) is used as it is. Otherwise
    the stream is drawn from ``generator``, or from torch's default generator of the device, and advances it:
    ``torch.manual_seed``, activation checkpointing and CUDA-graph replay act on it as on ``torch.nn.Dropout``.

    Threads of ours that share a CUDA generator take turns. torch's own operations, in another thread, may still use it
    between our two calls: the lock that would stop them is out of reach of Python.
    """
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator exclude each other: give one of them")
        return Stream(_checked_seed(seed, device))
    if torch.compiler.is_compiling() or backend.watched() or device.type == "meta":
        # Every call of a graph draws anew, ``torch.func.vmap`` may draw for each example, and without data there is no
        # number.
        if torch.compiler.is_compiling() and _is_recomputed() and torch.is_grad_enabled():
            return Stream(checkpoint(_drawn, device, generator, use_reentrant=False))
        return Stream(_drawn(device, generator))
    if device.type != "cuda":
        return Stream(int(_drawn(device, generator)))
    if torch.cuda.is_current_stream_capturing():
        return _recorded(device, generator)
    # No kernel and no synchronization: CUDA generators are counter-based and count on the host.
    generator = generator or torch.cuda.default_generators[_index(device)]
    with _lock:
        offset = generator.get_offset()
        generator.set_offset(offset + STEP)
        # torch's own kernels draw from Philox under the raw seed: another key keeps our streams apart from theirs.
        return Stream(_signed(generator.initial_seed() ^ 0x6661737472656721), offset)


def is_wanted(seed: int | Tensor | None, generator: Generator | None) -> bool:
    """Whether a stream has to be drawn where torch's own random functions would do: asked for by a seed or a generator,
    or needed in a graph that may draw twice."""
    return seed is not None or generator is not None or (torch.compiler.is_compiling() and _is_recomputed())


def _drawn(device: torch.device, generator: Generator | None) -> Tensor:
    """A seed in memory, which an operator of a graph draws."""
    return torch.randint(0, 2**63 - 1, (1,), generator=generator, dtype=torch.int64, device=device)


@backend.constant_in_graphs
def _is_recomputed() -> bool:
    """Whether the backward pass of a graph that is compiled may draw once more what the forward pass has drawn.

    With an activation memory budget below 1, torch.compile computes again what it does not save, and a random number
    comes out as another one (pytorch#190717), unless it belongs to a checkpoint, whose generator is put back. (Graphs
    without gradients compute nothing again, and torch compiles no checkpoint of random numbers in them.)
    """
    region = traceback.current_meta.get("custom", {})
    return region.get("_region_activation_memory_budget", config.activation_memory_budget) < 1


_seeds: dict[tuple, tuple[Tensor, Iterator[int]]] = {}
"""The seed of each stream and generator, and the offsets that follow, in the CUDA graph that was recorded last."""


def _recorded(device: torch.device, generator: Generator | None) -> Stream:
    """While a CUDA graph is recorded: one seed, which each replay draws anew, serves all operations of a CUDA stream,
    which count their offsets here. Another CUDA stream would have to wait for that seed, so it draws its own."""
    graph = backend.capture_id(device)
    if graph is None:
        return Stream(_drawn(device, generator))
    key = graph, torch.cuda.current_stream(device).cuda_stream, generator
    with _lock:
        if key not in _seeds:
            for other in [other for other in _seeds if other[0] != graph]:
                del _seeds[other]
            _seeds[key] = _drawn(device, generator), itertools.count(0, STEP)
        seed, offsets = _seeds[key]
        return Stream(seed, next(offsets))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed number with the same bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a == b or (a.type == b.type == "cuda" and _index(a) == _index(b))


def _checked_seed(seed: int | Tensor, device: torch.device) -> int | Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or not _same_device(seed.device, device):
            raise ValueError(
                f"a seed tensor has to be int64 with one element on {device}, "
                f"but got {seed.dtype} with {seed.numel()} elements on {seed.device}"
            )
        return seed
    number = plain(seed)
    if not is_integer(number):
        raise TypeError(f"seed has to be an int or an int64 tensor, but got {type(seed).__name__}")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed has to fit in 64 bits, but got {number}")
    return _signed(number)
