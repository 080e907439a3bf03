"""Tensors as lines of channels, and lines dealt to programs: the geometry of ``kernels/channel_norm/``."""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.layout import ceil_div, dense

WHOLE_BYTES = 224 << 10
"""Bytes that the programs of one multiprocessor may read twice where they take whole units. The second read comes
from the L2 cache; on an H100 all multiprocessors together fill 60 % of it. (An estimate, until it is measured.)"""


SHORTEST_TILE, LONGEST_TILE = 1 << 5, 1 << 13
"""Elements along a line of a tile, where the line has so many."""


class View(NamedTuple):
    """A dense tensor as lines: [segments, lines, along] in memory, or [batches, along, lines] (last)."""

    last: bool
    batches: int
    lines: int  # of a batch
    along: int  # elements of a line in a segment
    segments: int
    channels: int
    width: int  # neighbouring lines that share statistics
    repeat: int = 1  # neighbouring lines that are of one channel

    @property
    def units(self) -> int:
        return self.batches * self.lines // self.width

    @property
    def unit_elements(self) -> int:
        return self.width * self.segments * self.along

    @property
    def batched(self) -> bool:
        """Whether a line may have elements of several samples, as those of channels have."""
        return self.batches * self.lines == self.channels * self.repeat and self.width == self.repeat

    @property
    def innermost(self) -> int:
        return self.lines if self.last else self.along

    @property
    def indexable(self) -> bool:
        """Whether lines, their elements, tiles and offsets in a tile fit in the 32 bits that kernels count in."""
        if self.batches * self.segments * self.lines * self.along < 1 << 31:
            return True
        counts = self.batches * self.lines, self.along, self.segments * ceil_div(self.along, SHORTEST_TILE)
        offset = self.lines * LONGEST_TILE if self.last else 0
        return max(*counts, offset) <= (1 << 31) - LONGEST_TILE


def view(x: Tensor, groups: int) -> View | None:
    """How to see the dense tensor ``x`` [samples, channels, ...], or None if its layout tears samples apart."""
    count, samples, channels = x.numel(), x.shape[0], x.shape[1]
    narrow = 8 // x.element_size()  # elements of an access of 8 bytes
    spatial = math.prod(x.shape[2:])
    if groups == 0:
        if channels == 1:
            segments = 1 if count < 1 << 31 else samples
            return View(False, 1, 1, count // segments, segments, 1, 1)
        after = x.stride(1)
        if after == 1:
            return View(True, 1, channels, count // channels, 1, channels, 1)
        if after % narrow and channels * after % narrow == 0 and count > 8 * channels * after:
            # Short odd planes, as 7 x 7: a row is all planes of a sample, which vectors do divide.
            return View(True, 1, channels * after, count // (channels * after), 1, channels, after, after)
        return View(False, 1, channels, after, count // (channels * after), channels, 1)
    if samples > 1 and x.stride(0) != channels * spatial:
        return None
    width = channels // groups
    if channels == 1 or x.stride(1) == spatial:
        return View(False, 1, samples * channels, spatial, 1, channels, width)
    if x.stride(1) == 1:
        return View(True, samples, channels, spatial, 1, channels, width)
    return None


def view_of(x: Tensor, groups: int) -> View:
    """The view of a tensor that is laid out for it."""
    seen = view(x, groups)
    assert seen is not None
    return seen


def _viewed(x: Tensor, groups: int) -> tuple[Tensor, View]:
    x = dense(x)
    seen = view(x, groups)
    if seen is None:
        x = x.contiguous()
        seen = view_of(x, groups)
    return x, seen


def viewed(x: Tensor, groups: int) -> tuple[Tensor, View]:
    """``x`` in a dense layout that the kernels can take (itself wherever possible), and the view."""
    x, seen = _viewed(x, groups)
    if not seen.indexable:
        raise RuntimeError(
            f"the kernels cannot count the elements of a tensor of shape {tuple(x.shape)} in 32 bits"
        )
    return x, seen


def laid_out(x: Tensor, groups: int) -> Tensor:
    """``x`` in a dense layout that the kernels can take: itself wherever possible."""
    return x if x.is_contiguous() and x.numel() < 1 << 31 else viewed(x, groups)[0]


def indexable(x: Tensor, groups: int) -> bool:
    """Whether ``viewed`` takes ``x``. The question costs time only for 2^31 elements and more."""
    return x.numel() < 1 << 31 or _viewed(torch.empty_like(x, device="meta"), groups)[1].indexable


# --- plans -----------------------------------------------------------------------------------------------


def _power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _power_below(number: int) -> int:
    """The largest power of 2 that is not above ``number``."""
    return 1 << number.bit_length() - 1


class Plan(NamedTuple):
    """How lines are dealt to programs."""

    block: int  # lines of a program
    lines: int  # of its tile: a power of 2
    along: int
    vector: int
    warps: int
    units: int  # of the block, rounded up to a power of 2; 0: every line is one
    parts: int = 1  # the block has so many times the lines of a tile
    kept: int = 0  # tiles of a line that a program keeps in registers; 0: it reads them twice
    reread: bool = False  # of two tensors, it keeps the second alone

    def blocks(self, seen: View) -> int:
        return seen.batches * ceil_div(seen.lines, self.block)

    def grid(self, seen: View) -> tuple[int, int]:
        """The grid of kernels that take whole units."""
        return ceil_div(seen.lines, self.block), seen.batches

    def tiles(self, seen: View) -> int:
        return seen.segments * ceil_div(seen.along, self.along)

    def filled(self, seen: View) -> bool:
        """Whether every tile has all of its lines."""
        return self.block == self.parts * self.lines and seen.lines % self.block == 0

    def even(self, seen: View) -> bool:
        """Whether all tiles are full: then none is masked. A line may have fewer tiles than a program keeps."""
        tiles = self.kept or ceil_div(seen.along, self.along)
        return tiles * self.along == seen.along and self.filled(seen)

    def run(self, seen: View) -> int:
        """Neighbouring lines that a thread has, and that touch no more than two units."""
        return min(self.vector, _power_below(seen.width)) if seen.last and self.units > 1 else 1

    def touched(self, seen: View) -> int:
        """How many runs a unit touches, rounded up to a power of 2."""
        return _power_of_2(ceil_div(seen.width - 1, self.run(seen)) + 1) if self.units > 1 else 1

    def full(self, seen: View) -> int:
        """How many of the kept tiles of a line are full whatever the size of the batch, which may vary."""
        return min(self.kept, seen.along // self.along) if self.filled(seen) and not seen.batched else 0


ELEMENTS_PER_WARP = 512  # of a tile: 16 a thread, so that sums of them stay in registers


def _vector(seen: View, itemsize: int) -> int:
    return math.gcd(16 // itemsize, seen.innermost)


def _along(length: int, least: int, most: int) -> int:
    """Elements along a line of a tile: the width that wastes least, and the widest of those."""
    if length <= 256:
        return min(_power_of_2(length), most)
    widths = [width for width in (2048, 1024, 512, 256, 128) if least <= width <= most]
    return min(widths, key=lambda width: ceil_div(length, width) * width)


def _units(seen: View, block: int) -> int:
    return 0 if seen.width == 1 else _power_of_2(block // seen.width)


def split_plan(seen: View, itemsize: int, warps: int = 4) -> Plan:
    """Tiles of neighbouring lines, whatever unit they are in. Channels last, 128 bytes of a row: a cache line."""
    size = ELEMENTS_PER_WARP * warps
    if seen.last:
        lines = min(_power_of_2(seen.lines), 128 // itemsize)
        along = size // lines
    else:
        # As many lines as fill a tile; of a few, no more than divide them.
        lines = math.gcd(seen.lines, size) if seen.lines < 64 else size
        along = _along(seen.along, min(size // lines, 2048), size)
        lines = min(size // along, lines)
        if lines * seen.along >= 1 << 31:
            lines = 1  # offsets in a tile have 32 bits
    return Plan(lines, lines, along, _vector(seen, itemsize), warps, 0)


MOST_BATCHES = (1 << 16) - 1  # the second dimension of a CUDA grid
MOST_PARTS = 8  # each is code of its own


def whole_plan(
    seen: View, itemsizes: tuple[int, ...], device: torch.device, activated: bool = False
) -> Plan | None:
    """Whole units to each program, or None: where that would leave multiprocessors idle, or read memory twice.

    itemsizes: of x, and of dy in the backward pass. activated: whether that has an activation to go through.
    """
    if seen.batches > MOST_BATCHES:
        return None
    multiprocessors = backend.multiprocessors(device)
    kept = _kept_plan(seen, itemsizes, multiprocessors, activated)
    return kept or _read_twice_plan(seen, itemsizes, multiprocessors)


def _fills(seen: View, block: int, multiprocessors: int) -> bool:
    """Whether there is a program for each multiprocessor, or so few elements that three launches take longer."""
    alone = block * seen.segments * seen.along <= 16384
    return alone or seen.batches * ceil_div(seen.lines, block) >= multiprocessors


def _kept_most(seen: View, block: int, tensors: int, activated: bool) -> tuple[int, int]:
    """How many registers of the 128 of a thread kept tiles may take, and of how many elements, so that no thread
    spills on any target. Channels last, a thread has several of all values that a line has one of; of those that a unit
    has one of, too, if there are several; and of masks. The derivative of an activation is computed from one tile while
    the others wait, or, of planes, are still to be loaded."""
    if seen.repeat > 1:
        alone, both = 40, 32 if activated else 28
    elif seen.last:
        alone = 40
        both = 28 if block == seen.width == _power_of_2(block) else 16
    else:
        alone = 64
        both = 50 if activated else 64
    return both if tensors == 2 else alone, 80 if block == seen.width else 64


def _parts(block: int, seen: View) -> int:
    """Channels first, tiles to which the lines of one unit are dealt so that none has lines that are not there: a
    group of 10 channels is 5 tiles of 2, or would be 10 lines in one of 16."""
    parts = block // math.gcd(block, 1 << 16)
    return parts if block == seen.width and not seen.last and parts <= MOST_PARTS else 1


@functools.lru_cache(1024)
def _kept_plan(seen: View, itemsizes: tuple[int, ...], multiprocessors: int, activated: bool) -> Plan | None:
    """Whole units in the registers of each program, or None where they do not fit.

    Of all tiles that fit, those with the fewest predicted instructions an element: elements that are not there are
    computed like the others. 4 or 8 warps leave room for a second program, whose loads hide behind the arithmetic of
    the first; 16 do not, but are what the loops take for units of that size, too.
    """
    if seen.segments > 1 or max(itemsizes) > 4:
        return None
    vector = _vector(seen, itemsizes[0])
    unit = math.lcm(seen.width, math.gcd(seen.lines, 8)) if seen.last else seen.width
    # A power of 2 of units, or all.
    blocks = [block for k in range(10) if (block := unit << k) < 2 * seen.lines]
    best, plan = math.inf, None
    for warps, block, vectors in itertools.product((4, 8, 16), blocks, (1, 2)):
        block = min(block, seen.lines)
        parts = _parts(block, seen)
        lines = _power_of_2(block // parts)
        threads, size = 32 * warps, 32 * warps * vectors * vector
        along = size // lines
        run = lines if seen.last else along  # neighbouring elements of a tile
        long = run >= vector and (seen.last or run * itemsizes[0] >= 64 or run >= seen.along)
        if not (along and along <= _power_of_2(seen.along) and long and _fills(seen, block, multiprocessors)):
            continue
        most_registers, most_elements = _kept_most(seen, block, len(itemsizes), activated)
        kept = ceil_div(seen.along, along)
        if seen.batched:
            # A kernel for each number of tiles is compiled, and a batch may have any size.
            kept = _power_of_2(kept)
        elements = parts * kept * size // threads
        both = elements * sum(itemsizes) // 4
        reread = len(itemsizes) == 2 and both > most_registers
        registers = elements * itemsizes[1] // 4 if reread else both
        # Instructions of an element, and of a thread for what a program does once. (Estimates.)
        cost = ((22 if reread else 20) * elements + 200 + 100 * parts) * threads / (block * seen.along)
        if seen.batches * ceil_div(seen.lines, block) < multiprocessors:
            cost *= 2  # idle ones
        if registers <= most_registers and elements <= most_elements and cost < best:
            best = cost
            plan = Plan(block, lines, along, vector, warps, _units(seen, block), parts, kept, reread)
    return plan


def _read_twice_plan(seen: View, itemsizes: tuple[int, ...], multiprocessors: int) -> Plan | None:
    """Whole units that a program reads twice, the second time from a cache."""
    itemsize, tensors = itemsizes[0], len(itemsizes)
    line_bytes = seen.segments * seen.along * itemsize * tensors
    room = WHOLE_BYTES // line_bytes  # lines
    block = math.lcm(seen.width, math.gcd(seen.lines, 8)) if seen.last else seen.width
    if seen.last:
        # 64 bytes of each row where there is room, 32 at least, and whole vectors and bytes of signs.
        block = min(block * max(1, min(room, 64 // itemsize) // block), seen.lines)
        if block < min(seen.lines, 32 // itemsize):
            return None
    if block > room:
        return None
    # A multiprocessor runs 16 warps of these kernels at a time, which together read so many bytes twice.
    # Forward, blocks of whole planes have hundreds of lines, whose sums over units need the registers of 8 warps.
    least = 8 if seen.repeat > 1 and tensors == 1 else 4
    warps = next(w for w in (4, 8, 16) if w >= least and block * line_bytes * 16 <= WHOLE_BYTES * w)
    size = ELEMENTS_PER_WARP * warps
    if seen.last:
        along = size // _power_of_2(block)
    else:
        parts = _parts(block, seen)
        if parts > 1:
            lines = block // parts
            along = min(_power_of_2(seen.along), size // lines)
            plan = Plan(block, lines, along, _vector(seen, itemsize), warps, _units(seen, block), parts)
            return plan if _fills(seen, block, multiprocessors) else None
        # As many units as fill a tile, and at least 64 bytes along a line.
        along = min(_along(seen.along, 0, size), max(size // _power_of_2(block), 64 // itemsize))
        units = min(size // along // _power_of_2(block), room * warps // (16 * block))
        if seen.width == 1:
            units = min(units, seen.lines // multiprocessors)
        block = min(block * _power_below(max(1, units)), seen.lines)
    lines = _power_of_2(block)
    plan = Plan(block, lines, along, _vector(seen, itemsize), warps, _units(seen, block))
    return plan if _fills(seen, block, multiprocessors) and 0 < lines * along <= size else None


def merge_plan(seen: View) -> Plan:
    """For the kernels that merge splits, whose lines are those of all batches."""
    block = max(1, 8 // seen.width) * seen.width
    lines = _power_of_2(block)
    return Plan(block, lines, max(1, 1024 // lines), 1, 4, _units(seen, block))
