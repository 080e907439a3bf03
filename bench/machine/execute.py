"""Runs the blocks of a kernel: all threads of some programs in step, each block once for all that have come to it.

Threads that part meet again where they come to the same block: the one that stands first in the code goes first. With
a seed, the warps of every program take turns in random groups, from one barrier to the next, and the programs come in
a random order: what a kernel computes must not depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy import ndarray

from .accesses import Mask
from .counters import Counters
from .memory import UNWRITTEN, Fault, Global, Region
from .parse import Kernel, Unknown, parse
from .races import WARP
from .translate import NUMPY, TYPES, Translator, also, kept
from .warpgroups import Early, Flight, Warpgroups

_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


@dataclass(frozen=True)
class Options:
    seed: int = 0  # of the order of warps and programs; 0: all in step
    errors: int = 0  # seed of the errors of approximate functions; 0: none
    ordered: bool = True  # whether races are looked for
    counting: bool = False  # instructions, bytes and sectors
    lanes: int = 1 << 14  # threads that run at once, at most
    most_blocks: int = 1 << 21  # more is taken for an endless loop
    programs: tuple[int, ...] | None = None  # only these of the grid


class Program:
    """A kernel, ready to run."""

    def __init__(self, ptx: str):
        self.kernel: Kernel = parse(ptx)
        self._constants = {
            name: np.frombuffer(raw, np.uint8).copy() for name, raw in self.kernel.constants.items()
        }
        self.constants = [
            Region(raw.ctypes.data, raw.ctypes.data + len(raw), name) for name, raw in self._constants.items()
        ]
        translator = Translator(self.kernel, {region.name: region.start for region in self.constants})
        self.blocks, self.sites = translator.blocks, translator.sites
        self.unwritten = [_unwritten(kind) for kind in self.kernel.registers.values()]
        self.granules = {space: self._narrowest(space) for space in ("global", "shared")}
        self.in_step = any(i.opcode.startswith("wgmma") for i in self.sites)  # warps that multiply together

    def _narrowest(self, space: str) -> int:
        """Bytes of the narrowest access, by which all are aligned."""
        widths = [16]
        for instruction in self.sites:
            name, *modifiers = instruction.opcode.split(".")
            if name in ("ld", "st", "atom", "red") and {space, f"{space}::cta"} & {*modifiers}:
                count = next((_VECTORS[m] for m in modifiers if m in _VECTORS), 1)
                (kind,) = (m for m in modifiers if m in TYPES)
                widths.append(count * np.dtype(NUMPY[kept(kind)]).itemsize)
            elif instruction.opcode.startswith("cp.async.c") and len(instruction.operands) > 2:
                widths.append(int(instruction.operands[2], 0))
        return min(widths)


def _unwritten(kind: str) -> ndarray:
    """What a register holds that nothing wrote: LLVM packs such ones beside others."""
    if kind == "pred":
        return np.zeros((1, 1), bool)
    return np.full(8, UNWRITTEN, np.uint8).view(NUMPY[kept(kind)])[:1].reshape(1, 1)


@dataclass
class Launch:
    """One launch: what its programs share."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    parameters: Sequence[bytes]
    regions: Sequence[Region]
    shared_bytes: int  # beside those that the PTX declares
    options: Options = field(default_factory=Options)
    freed: Sequence[Region] = ()
    counters: Counters = field(default_factory=Counters)

    def run(self) -> Counters:
        kernel, options = self.program.kernel, self.options
        if len(self.parameters) != len(kernel.parameters):
            raise Unknown(
                f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(self.parameters)}"
            )
        if kernel.threads not in (0, self.threads):
            raise Unknown(f"{kernel.name} wants {kernel.threads} threads")
        numbers = np.arange(self.grid[0] * self.grid[1] * self.grid[2])
        numbers = numbers if options.programs is None else np.array(options.programs)
        if options.seed:
            self.random = np.random.default_rng(options.seed)
            self.random.shuffle(numbers)
        together = max(1, options.lanes // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), together):
                Run(self, numbers[first : first + together]).run()
        return self.counters

    @cached_property
    def memory(self) -> Global:
        regions = [*self.regions, *self.program.constants]
        granule = self.program.granules["global"]
        return Global(regions, granule, self.threads, self.options.ordered, self.freed)


class Run(Warpgroups):
    """Some programs of a launch at once; what the blocks call ``m``."""

    def run(self) -> None:
        self.gone: ndarray = np.zeros((1, 1), bool)
        self.flights = [Flight()]
        self.waiting: dict[int, ndarray] = {}
        turns = self._turns()
        pending = [{0: turn} for turn in turns]
        while True:
            for i in self._order(len(turns)):
                self._advance(pending[i])
            if not self.waiting:
                return
            number, mask = self._release()
            for turn, blocks in zip(turns, pending, strict=True):
                here = mask if turn is None else turn if mask is None else mask & turn
                if here is None or here.any():
                    blocks[number] = here

    def _turns(self) -> list[Mask]:
        if not self.options.seed or self.launch.program.in_step:
            return [None]
        group = self.launch.random.integers(0, min(4, self.warps), self.warps)
        return [np.repeat(group == k, WARP)[None] for k in np.unique(group)]

    def _order(self, count: int) -> Sequence[int]:
        return self.launch.random.permutation(count) if count > 1 else range(count)

    def _advance(self, pending: dict[int, Mask]) -> None:
        """Until all threads wait or have returned."""
        blocks = self.launch.program.blocks
        while pending:
            number = min(pending)
            q = pending.pop(number)
            if number == len(blocks):
                raise Unknown(f"{self.kernel.name} has no end")
            block = blocks[number]
            self.steps += 1
            if self.steps > self.options.most_blocks:
                raise Fault(
                    f"{self.kernel.name}: more than {self.options.most_blocks} blocks: an endless loop?"
                )
            if self.options.counting:
                self.counters.ran(block, number, self._warps_of(q))
            try:
                taken = block.function(self, self.R, q)
            except Early as error:
                self._fail(block.site_of(error.__traceback__.tb_next.tb_lineno), str(error))
            rest = q
            if block.ends_with == "bar":
                _join(self.waiting, number + 1, q)
                continue
            if block.ends_with:
                here = q if taken is None else also(q, taken)
                rest = None if taken is None else also(q, ~taken)
                if here is None or here.any():
                    if block.ends_with == "trap":
                        self._fail(len(block.instructions) and self._site(number), "the kernel traps")
                    elif block.ends_with == "ret":
                        self.gone = np.ones((1, 1), bool) if here is None else self.gone | here
                    else:
                        _join(pending, block.target, here)
                if taken is None or not rest.any():
                    continue
            _join(pending, number + 1, rest)

    def _site(self, block: int) -> int:
        """The last instruction of a block."""
        return sum(len(b.instructions) for b in self.launch.program.blocks[: block + 1]) - 1

    def _release(self) -> tuple[int, Mask]:
        """The threads that pass the barrier at which all of their program wait."""
        number = min(self.waiting)
        mask = self.waiting.pop(number)
        site = self._site(number - 1)
        if mask is not None:
            here = np.broadcast_to(mask, self.shape)
            missing = here.any(1, keepdims=True) & ~here
            if missing.any():
                row, column = (int(x[0]) for x in np.nonzero(missing))
                gone = bool(np.broadcast_to(self.gone, self.shape)[row, column])
                does = "has returned" if gone else "waits at another"
                self._fail(site, f"a barrier that not all threads reach: this one {does}", row, column)
        passed = (
            np.ones((1, 1), bool) if mask is None else np.broadcast_to(mask, self.shape).any(1, keepdims=True)
        )
        self.barriers += passed
        self.warp_barriers += passed
        return number, None if mask is None or mask.all() else mask

    def _warps_of(self, q: Mask) -> int:
        return self.count * self.warps if q is None else int(self.by_warp(q).any(-1).sum())

    def by_warp(self, x: ndarray) -> ndarray:
        return np.broadcast_to(x, self.shape).reshape(self.count, self.warps, WARP)


def _join(blocks: dict[int, Mask], number: int, mask: Mask) -> None:
    if number in blocks and mask is not None and blocks[number] is not None:
        mask = blocks[number] | mask
    blocks[number] = None if mask is None or mask.all() else mask
