"""Runs the blocks of a kernel: all threads of some programs in step, each block once for all that have come to it.

Threads that part meet again where they come to the same block: the one that stands first in the code goes first. With
a seed, the warps of every program take turns in random groups, from one barrier to the next, and the programs come in
a random order: what a kernel computes must not depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy import int64, ndarray, uint32, uint64

from . import arithmetic, matrix
from .counters import Counters
from .memory import UNSIGNED, UNWRITTEN, Fault, Global, Local, Place, Problem, Region, Shared
from .parse import Instruction, Kernel, Unknown, parse
from .races import ANYWHERE, IN_PROGRAM, THREAD, WARP, Actors
from .translate import NUMPY, TYPES, Translator, also, kept

_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


@dataclass(frozen=True)
class Options:
    seed: int = 0  # of the order of warps and programs; 0: all in step
    ordered: bool = True  # whether races are looked for
    counting: bool = False  # instructions, bytes and sectors
    lanes: int = 1 << 14  # threads that run at once, at most
    most_blocks: int = 1 << 21  # more is taken for an endless loop


class Program:
    """A kernel, ready to run."""

    def __init__(self, ptx: str):
        self.kernel: Kernel = parse(ptx)
        self._constants = {name: np.frombuffer(raw, np.uint8).copy() for name, raw in self.kernel.constants.items()}
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
            raise Unknown(f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(self.parameters)}")
        if kernel.threads not in (0, self.threads):
            raise Unknown(f"{kernel.name} wants {kernel.threads} threads")
        numbers = np.arange(self.grid[0] * self.grid[1] * self.grid[2])
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


class _Selected(NamedTuple):
    """The threads of one access: their addresses, flat, and how they lie in [programs, threads]."""

    address: ndarray
    shape: tuple[int, int]
    mask: ndarray | None  # of that shape

    def spread(self, values: ndarray) -> ndarray:
        if self.mask is None:
            return values.reshape(self.shape)
        result = np.zeros(self.shape, values.dtype)
        result[self.mask] = values
        return result

    def flat(self, values: ndarray) -> ndarray:
        values = np.broadcast_to(values, self.shape)
        return values.ravel() if self.mask is None else values[self.mask]

    def where(self, place: int) -> tuple[int, int]:
        """Row and column of an access."""
        if self.mask is not None:
            place = int(np.flatnonzero(self.mask)[place])
        return divmod(place, self.shape[1])


class _Copy(NamedTuple):
    """An asynchronous copy of every thread that has none of its bytes yet."""

    to: ndarray
    source: ndarray
    size: int
    reads: ndarray  # threads that read; others write zeros
    mask: ndarray  # threads that still wait, [programs, threads]
    group: ndarray
    site: int


class Run:
    """Some programs of a launch at once; what the blocks call ``m``."""

    def __init__(self, launch: Launch, numbers: ndarray):
        self.launch, self.options, self.kernel = launch, launch.options, launch.program.kernel
        self.memory, self.counters = launch.memory, launch.counters
        self.numbers, self.count, self.size = numbers, len(numbers), launch.threads
        self.shape, self.warps = (self.count, self.size), self.size // WARP
        self.thread = np.arange(self.size, dtype=uint32)[None]
        self.lane, self.warp = self.thread % uint32(WARP), self.thread // uint32(WARP)
        self.zero, self.one = np.zeros((1, 1), uint32), np.ones((1, 1), uint32)
        self.threads = np.full((1, 1), self.size, uint32)
        self.grid = [np.full((1, 1), size, uint32) for size in launch.grid]
        x, y, _ = launch.grid
        coordinates = (numbers % x, numbers // x % y, numbers // (x * y))
        self.program = [
            np.zeros((1, 1), uint32) if size == 1 else c.astype(uint32)[:, None]
            for c, size in zip(coordinates, launch.grid, strict=True)
        ]
        self.parameters = dict(zip(self.kernel.parameters, launch.parameters, strict=True))
        self.R = list(launch.program.unwritten)
        self.identity = numbers[:, None].astype(int64) * self.size + self.thread
        self.barriers = np.zeros((self.count, 1), np.int32)
        self.warp_barriers = np.zeros(self.shape, np.int32)
        self.row = np.arange(self.count, dtype=int64)[:, None]
        bytes_ = self.kernel.shared_bytes + launch.shared_bytes
        granule = launch.program.granules["shared"]
        self.shared = Shared(self.count, bytes_, granule, self.size, self.options.ordered)
        self.local = Local(self.count * self.size, self.kernel.local_bytes)
        self.copies: list[_Copy] = []
        self.committed = np.zeros(self.shape, int64)
        self.flights: list[list[tuple[int, Place, int]]] = [[]]  # of products: one group after another
        self.steps = 0

    # --- the order of things

    def run(self) -> None:
        self.gone: ndarray = np.zeros((1, 1), bool)
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

    def _turns(self) -> list[ndarray | None]:
        if not self.options.seed or self.launch.program.in_step:
            return [None]
        group = self.launch.random.integers(0, min(4, self.warps), self.warps)
        return [np.repeat(group == k, WARP)[None] for k in np.unique(group)]

    def _order(self, count: int) -> Sequence[int]:
        return self.launch.random.permutation(count) if count > 1 else range(count)

    def _advance(self, pending: dict[int, ndarray | None]) -> None:
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
                raise Fault(f"{self.kernel.name}: more than {self.options.most_blocks} blocks: an endless loop?")
            if self.options.counting:
                self.counters.ran(block, number, self._warps_of(q))
            taken = block.function(self, self.R, q)
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

    def _release(self) -> tuple[int, ndarray | None]:
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
        passed = np.ones((1, 1), bool) if mask is None else np.broadcast_to(mask, self.shape).any(1, keepdims=True)
        self.barriers += passed
        self.warp_barriers += passed
        return number, None if mask is None or mask.all() else mask

    def _warps_of(self, q: ndarray | None) -> int:
        return self.count * self.warps if q is None else int(self.by_warp(q).any(-1).sum())

    def by_warp(self, x: ndarray) -> ndarray:
        return np.broadcast_to(x, self.shape).reshape(self.count, self.warps, WARP)

    # --- faults

    def _fail(self, site: int, what: str, row: int = 0, column: int = 0, address: int | None = None) -> None:
        x, y, _ = self.launch.grid
        number = int(self.numbers[row])
        program = (number % x, number // x % y, number // (x * y))
        at = "" if address is None else f", address {address:#x}"
        instruction: Instruction = self.launch.program.sites[site]
        raise Fault(f"{self.kernel.where(instruction)}\n  program {program}, thread {column}{at}: {what}")

    def _fault(self, problem: Problem, site: int, selected: _Selected) -> None:
        row, column = selected.where(problem.place)
        what = problem.what
        if problem.other is not None:
            number, thread = divmod(problem.other, self.size)
            what += f": thread {thread} of program number {number}"
        self._fail(site, what, row, column, int(selected.address[problem.place]))

    # --- loads and stores

    def _select(self, address: ndarray, mask: ndarray | None, whole: bool) -> _Selected:
        shape = np.broadcast_shapes(address.shape, () if mask is None else mask.shape, self.shape if whole else ())
        if mask is None:
            return _Selected(np.broadcast_to(address, shape).ravel(), shape, None)
        mask = np.broadcast_to(mask, shape)
        return _Selected(np.broadcast_to(address, shape)[mask], shape, mask)

    def _actors(self, selected: _Selected) -> Actors | None:
        """An address that threads share counts for all of them."""
        if not self.options.ordered:
            return None
        scope = THREAD if selected.shape == self.shape else ANYWHERE if selected.shape[0] < self.count else IN_PROGRAM
        rows, columns = selected.shape
        values = (self.identity, self.barriers, self.warp_barriers)
        return Actors(*(selected.flat(x[:rows, :columns]) for x in values), scope)

    def _locate(self, space: str, selected: _Selected, size: int, site: int) -> Place:
        if space == "global":
            found = self.memory.locate(selected.address, size)
        elif space == "shared":
            found = self.shared.locate(selected.address, size, selected.flat(self.row[: selected.shape[0]]))
        else:
            lane = np.arange(self.count * self.size, dtype=int64).reshape(self.shape)
            found = self.local.locate(selected.address, size, selected.flat(lane))
        if isinstance(found, Problem):
            self._fault(found, site, selected)
        return found

    def load(self, space: str, address: ndarray, mask: ndarray | None, width: int, count: int, site: int) -> list[ndarray]:
        whole = space != "global" and not (space == "shared" and address.shape[0] == self.count)
        selected = self._select(address, mask, whole)
        if not len(selected.address):
            return [np.zeros((1, 1), UNSIGNED[width])] * count
        place = self._locate(space, selected, width * count, site)
        if space == "local":
            return [selected.spread(x) for x in self.local.buffer.gather(place.index, width, count)]
        memory = self.memory if space == "global" else self.shared
        if space == "shared" and (problem := self.shared.unready(place, width * count)):
            self._fault(problem, site, selected)
        if self.options.counting:
            self._count("loads" if space == "global" else "shared", address, mask, width * count)
        found, problem = memory.read(place, width, count, self._actors(selected))
        if problem:
            self._fault(problem, site, selected)
        return [selected.spread(x) for x in found]

    def store(self, space: str, address: ndarray, values: Sequence[ndarray], mask: ndarray | None, width: int, site: int) -> None:
        if mask is not None and not mask.any():
            return  # at whatever address
        selected = self._select(address, mask, whole=True)
        place = self._locate(space, selected, width * len(values), site)
        flat = [selected.flat(x) for x in values]
        if space == "local":
            self.local.buffer.scatter(place.index, width, flat)
            return
        memory = self.memory if space == "global" else self.shared
        if space == "shared" and (problem := self.shared.busy(place, width * len(values))):
            self._fault(problem, site, selected)
        if self.options.counting:
            self._count("stores" if space == "global" else "shared", address, mask, width * len(values))
        if problem := memory.write(place, width, flat, self._actors(selected)):
            self._fault(problem, site, selected)

    def _count(self, kind: str, address: ndarray, mask: ndarray | None, size: int) -> None:
        lanes = None if mask is None else self.by_warp(mask).reshape(-1, WARP)
        self.counters.accessed(kind, self.by_warp(address).reshape(-1, WARP), lanes, size)

    def parameter(self, name: str, offset: int, kind: type) -> ndarray:
        return np.frombuffer(self.parameters[name], kind, 1, offset).reshape(1, 1)

    def atomic(self, space, name, address, values, mask, kind: str, site: int) -> ndarray:
        """One thread after another. Atomic operations race with nothing."""
        selected = self._select(address, mask, whole=True)
        size = np.dtype(NUMPY[kept(kind)]).itemsize
        result = np.zeros(len(selected.address), NUMPY[kept(kind)])
        if len(result):
            place = self._locate(space, selected, size, site)
            memory = self.memory if space == "global" else self.shared
            if space == "shared" and (problem := self.shared.unready(place, size)):
                self._fault(problem, site, selected)
            unit = memory.buffer.units[size]
            operands = [selected.flat(x) for x in values]
            for i, at in enumerate(place.index // size):
                old = unit[at : at + 1].view(NUMPY[kept(kind)]).copy()
                new = _combined(name, kind, old, *(x[i : i + 1] for x in operands))
                unit[at] = np.ascontiguousarray(new).view(UNSIGNED[size])[0]
                result[i] = old[0]
        return selected.spread(result)

    # --- asynchronous copies

    def copy(self, to: ndarray, source: ndarray, size: int, reads: ndarray | None, mask: ndarray | None, site: int) -> None:
        """Nothing may touch the target until it is waited for: then, as late as allowed, it is written."""
        if reads is not None and not np.isin(reads, (0, size)).all():
            raise Unknown(f"{self.kernel.where(self.launch.program.sites[site])}: a copy of a part")
        here = np.broadcast_to(np.ones((1, 1), bool) if mask is None else mask, self.shape)
        reading = here if reads is None else here & (reads != 0)
        width = min(size, 8)
        if reading.any():
            selected = self._select(source, reading, whole=True)
            place = self._locate("global", selected, size, site)
            if self.options.counting:
                self._count("loads", source, reading, size)
            _, problem = self.memory.read(place, width, size // width, self._actors(selected))
            if problem:
                self._fault(problem, site, selected)
        if not here.any():
            return
        selected, place = self._shared_place(to, here, size, site)
        if problem := self.shared.busy(place, size):
            self._fault(problem, site, selected)
        nothing = [np.full(len(selected.address), UNWRITTEN, np.uint8).astype(UNSIGNED[width])] * (size // width)
        if problem := self.shared.write(place, width, nothing, self._actors(selected)):
            self._fault(problem, site, selected)
        self.shared.mark_arriving(place, size, True)
        whole = (np.broadcast_to(x, self.shape) for x in (to, source))
        self.copies.append(_Copy(*whole, size, reading, here.copy(), self.committed.copy(), site))

    def _shared_place(self, address: ndarray, mask: ndarray, size: int, site: int) -> tuple[_Selected, Place]:
        selected = self._select(address, mask, whole=True)
        return selected, self._locate("shared", selected, size, site)

    def commit_copies(self, mask: ndarray | None) -> None:
        self.committed += 1 if mask is None else mask

    def wait_copies(self, allowed: int, mask: ndarray | None, site: int) -> None:
        for copy in self.copies:
            done = copy.mask & (copy.group < self.committed - allowed)
            done = done if mask is None else done & mask
            if done.any():
                self._complete(copy, done)
                np.copyto(copy.mask, False, where=done)
        self.copies = [copy for copy in self.copies if copy.mask.any()]

    def _complete(self, copy: _Copy, done: ndarray) -> None:
        width = min(copy.size, 8)
        values = [np.zeros(self.shape, UNSIGNED[width]) for _ in range(copy.size // width)]
        reading = done & copy.reads
        if reading.any():
            selected = self._select(copy.source, reading, whole=True)
            place = self._locate("global", selected, copy.size, copy.site)
            found = self.memory.buffer.gather(place.index, width, len(values))
            values = [selected.spread(x) for x in found]
        selected, place = self._shared_place(copy.to, done, copy.size, copy.site)
        self.shared.mark_arriving(place, copy.size, False)
        flat = [selected.flat(x) for x in values]
        if problem := self.shared.write(place, width, flat, self._actors(selected)):
            self._fault(problem, copy.site, selected)

    # --- warps

    def lanes(self, side: str) -> ndarray:
        """%lanemask_lt and its like."""
        bit = uint32(1) << self.lane
        below = bit - uint32(1)
        return {"eq": bit, "lt": below, "le": below | bit, "gt": ~(below | bit), "ge": ~below}[side]

    def _members(self, members: ndarray, mask: ndarray | None, site: int) -> ndarray:
        """Which lanes take part, [programs, warps, 32]: those that are named, which all have to be there."""
        here = np.ones((1, 1, WARP), bool) if mask is None else self.by_warp(mask)
        if members.size == 1 and members[0, 0] == 0xFFFFFFFF:
            named = np.ones((1, 1, WARP), bool)
        else:
            named = (self.by_warp(members) >> np.arange(WARP, dtype=uint32)) & uint32(1) != 0
        wrong = here.any(-1, keepdims=True) & (named != here)
        if wrong.any():
            row, warp, lane = (int(x[0]) for x in np.nonzero(np.broadcast_to(wrong, (self.count, self.warps, WARP))))
            self._fail(site, "the lanes that are named are not those that are here", row, warp * WARP + lane)
        return here & named

    def warp_barrier(self, members: ndarray, mask: ndarray | None, site: int) -> None:
        here = self._members(members, mask, site).any(-1, keepdims=True)
        self.warp_barriers += np.broadcast_to(here, (self.count, self.warps, WARP)).reshape(self.shape)

    def shuffle(self, mode, x, by, limits, members, mask, site: int) -> tuple[ndarray, ndarray]:
        self._members(members, mask, site)
        lane, by = self.lane.astype(int64), (by & uint32(31)).astype(int64)
        segment, clamp = ((limits >> uint32(8)) & uint32(31)).astype(int64), (limits & uint32(31)).astype(int64)
        last = (lane & segment) | (clamp & ~segment)
        source = {
            "up": lambda: lane - by,
            "down": lambda: lane + by,
            "bfly": lambda: lane ^ by,
            "idx": lambda: (lane & segment) | (by & ~segment),
        }[mode]()
        valid = source >= last if mode == "up" else source <= last
        if x.shape[1] == 1:
            return x, valid
        source = np.where(valid, source, lane)
        if source.shape[0] == 1:
            column = source[0] + (self.thread[0].astype(int64) // WARP) * WARP
            return np.broadcast_to(x, (x.shape[0], self.size))[:, column], valid
        return np.take_along_axis(self.by_warp(x), self.by_warp(source), -1).reshape(self.shape), valid

    def reduce(self, name: str, x: ndarray, members: ndarray, mask: ndarray | None, site: int) -> ndarray:
        taking = self._members(members, mask, site)
        x = self.by_warp(x)
        first = np.take_along_axis(x, np.broadcast_to(taking, x.shape).argmax(-1)[..., None], -1)
        x = np.where(taking, x, first)  # of and, or, min and max it may come twice
        if name in ("add", "xor"):
            x = np.where(taking, x, x.dtype.type(0))
        function = {
            "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min.NaN": np.minimum,
            "max.NaN": np.maximum, "min": np.fmin, "max": np.fmax,
        }[name]  # fmt: skip
        return np.repeat(function.reduce(x, axis=-1).astype(x.dtype), WARP, axis=1)

    def vote(self, mode: str, p: ndarray, members: ndarray, mask: ndarray | None, site: int) -> ndarray:
        taking = self._members(members, mask, site)
        p = self.by_warp(p)
        if mode == "ballot":
            bits = (p & taking).astype(uint32) << np.arange(WARP, dtype=uint32)
            return np.repeat(np.bitwise_or.reduce(bits, axis=-1), WARP, axis=1)
        any_, all_ = (p & taking).any(-1), (p | ~taking).all(-1)
        found = {"any": any_, "all": all_, "uni": all_ | ~any_}[mode]
        return np.repeat(found, WARP, axis=1)

    def active(self, mask: ndarray | None) -> ndarray:
        here = self.by_warp(np.ones((1, 1), bool) if mask is None else mask)
        bits = here.astype(uint32) << np.arange(WARP, dtype=uint32)
        return np.repeat(np.bitwise_or.reduce(bits, axis=-1), WARP, axis=1)

    def elect(self, members: ndarray, mask: ndarray | None, site: int) -> tuple[ndarray, ndarray]:
        """The lowest lane that takes part, and whether this is it."""
        taking = np.broadcast_to(self._members(members, mask, site), (self.count, self.warps, WARP))
        lowest = np.repeat(taking.argmax(-1), WARP, axis=1).astype(uint32)
        return lowest, self.lane == lowest

    # --- matrices

    def _whole_warps(self, mask: ndarray | None, site: int) -> ndarray | None:
        """Which warps, [programs, warps]; all of their lanes have to be there."""
        if mask is None:
            return None
        self._members(np.full((1, 1), 0xFFFFFFFF, uint32), mask, site)
        return self.by_warp(mask).any(-1)

    def load_matrices(self, address: ndarray, count: int, transposed: bool, mask: ndarray | None, site: int) -> list[ndarray]:
        """Lane 8 k + r has the address of row r of matrix k; it reads the row, and all lanes get their parts."""
        self._whole_warps(mask, site)
        rows = also(mask, self.lane < uint32(8 * count))
        words = self.load("shared", np.broadcast_to(address, self.shape), rows, 4, 4, site)
        octets = np.stack([self.by_warp(word) for word in words], -1)[:, :, : 8 * count]
        elements = np.ascontiguousarray(octets).view(np.uint16).reshape(self.count, self.warps, count, 8, 8)
        found = matrix.fragments(elements, transposed)
        return [found[:, :, k].reshape(self.shape) for k in range(count)]

    def store_matrices(self, address: ndarray, values, transposed: bool, mask: ndarray | None, site: int) -> None:
        self._whole_warps(mask, site)
        count = len(values)
        elements = matrix.rows(np.stack([self.by_warp(x) for x in values], 2), transposed)
        words = np.ascontiguousarray(elements).view(uint32).reshape(self.count, self.warps, 8 * count, 4)
        words = np.tile(words, (1, 1, 4 // count, 1)).reshape(*self.shape, 4)
        rows = also(mask, self.lane < uint32(8 * count))
        self.store("shared", address, [words[..., k] for k in range(4)], rows, 4, site)

    def product(self, shape: str, kind: str, a, b, c, mask: ndarray | None, site: int) -> list[ndarray]:
        self._whole_warps(mask, site)
        a, b, c = ([self.by_warp(x) for x in operand] for operand in (a, b, c))
        return [x.reshape(self.shape) for x in matrix.product(shape, kind, a, b, c)]

    # --- products of warpgroups

    def _warpgroups(self, mask: ndarray | None, site: int) -> ndarray:
        """Which warpgroups, [programs, groups]; all of their threads have to be there."""
        if self.size % 128:
            self._fail(site, "a warpgroup has 128 threads")
        here = np.broadcast_to(np.ones((1, 1), bool) if mask is None else mask, self.shape)
        here = here.reshape(self.count, -1, 128)
        if (here.any(-1) != here.all(-1)).any():
            self._fail(site, "some threads of a warpgroup are not here")
        return here.all(-1)

    def fence_products(self, mask: ndarray | None, site: int) -> None:
        self._warpgroups(mask, site)

    def commit_products(self, mask: ndarray | None, site: int) -> None:
        self._warpgroups(mask, site)
        self.flights.append([])

    def wait_products(self, allowed: int, mask: ndarray | None, site: int) -> None:
        self._warpgroups(mask, site)
        complete = max(0, len(self.flights) - 1 - allowed)
        for group in self.flights[:complete]:
            for _, place, size in group:
                self.shared.mark_used(place, size, -1)
        self.flights = self.flights[complete:]

    def warpgroup_product(self, shape, kind, a, b, sums, accumulates, signs, transposed, mask, site: int) -> list[ndarray]:
        """The product is made at once. Until it is waited for, nothing may write to what it reads in shared memory."""
        here = self._warpgroups(mask, site)
        rows, columns, depth = matrix.sizes(shape)
        right = self._operand(b, columns, depth, kind, not transposed[1], here, site)
        if isinstance(a, tuple):
            parts = [np.broadcast_to(x, self.shape).reshape(self.count, -1, 4, WARP) for x in a]
            left = matrix.left_of_registers(parts, kind)
        else:
            left = self._operand(a, rows, depth, kind, not transposed[0], here, site)
        found = (signs[0] * signs[1]) * (left @ right.swapaxes(-1, -2))
        keep = np.broadcast_to(accumulates, self.shape)
        result = []
        for k, x in enumerate(matrix.of_accumulators(found, self.shape)):
            old = np.where(keep, sums[k], np.float32(0))
            result.append((x + old).astype(np.float32))
        return result

    def _operand(self, descriptor: ndarray, lines: int, depth: int, kind: str, along_depth: bool, here: ndarray, site: int) -> ndarray:
        """A matrix [lines, depth] in shared memory, for every warpgroup."""
        described = np.broadcast_to(descriptor, self.shape).reshape(self.count, -1, 128)
        if (described != described[..., :1])[here].any():
            self._fail(site, "the threads of a warpgroup name different matrices")
        width = 4 if kind == "tf32" else 2
        address = matrix.addresses(described[..., 0], lines, depth, width, along_depth)
        flat = address[here].astype(uint64)
        row = np.broadcast_to(self.row[:, :1], here.shape)[here].reshape(-1, *(1,) * (flat.ndim - 1))
        row = np.broadcast_to(row, flat.shape)
        place = self.shared.locate(flat.ravel(), width, row.ravel())
        selected = _Selected(flat.ravel(), (1, flat.size), None)
        if isinstance(place, Problem):
            self._fail(site, place.what, int(row.ravel()[place.place]), 0, int(flat.ravel()[place.place]))
        if problem := self.shared.unready(place, width):
            self._fail(site, problem.what, int(row.ravel()[problem.place]), 0, int(flat.ravel()[problem.place]))
        if self.options.ordered:
            group = np.broadcast_to(np.arange(here.shape[1]), here.shape)[here].reshape(-1, *(1,) * (flat.ndim - 1))
            first = np.broadcast_to(self.numbers[row] * self.size + group * 128, flat.shape).ravel()
            stamps = np.broadcast_to(self.barriers[row][..., 0], flat.shape).ravel()
            actors = Actors(first, stamps, stamps, IN_PROGRAM)
            _, problem = self.shared.read(place, width, 1, actors)
            if problem:
                self._fail(site, problem.what, int(row.ravel()[problem.place]), 0, int(flat.ravel()[problem.place]))
        self.shared.mark_used(place, width, 1)
        self.flights[-1].append((site, place, width))
        raw = self.shared.buffer.gather(place.index, width, 1)[0]
        values = np.zeros(address.shape, UNSIGNED[width])
        values[here] = raw.reshape(flat.shape)
        del selected
        return matrix.values(values, kind)


def _join(blocks: dict[int, ndarray | None], number: int, mask: ndarray | None) -> None:
    if number in blocks and mask is not None and blocks[number] is not None:
        mask = blocks[number] | mask
    blocks[number] = None if mask is None or mask.all() else mask


def _combined(name: str, kind: str, old: ndarray, *operands: ndarray) -> ndarray:
    if name == "exch":
        return operands[0]
    if name == "cas":
        return np.where(old == operands[0], operands[1], old)
    if name == "add" and kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return arithmetic.narrow("add", kind, old, operands[0])
    functions = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax,
    }  # fmt: skip
    return functions[name](old, operands[0])
