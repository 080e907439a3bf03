"""Loads, stores, atomic operations and asynchronous copies, each checked before it happens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy import int64, ndarray, uint32

from . import arithmetic
from .memory import UNSIGNED, UNWRITTEN, Fault, Local, Place, Problem, Shared
from .parse import Instruction, Unknown
from .races import ANYWHERE, IN_PROGRAM, THREAD, WARP, Actors
from .translate import NUMPY, kept

if TYPE_CHECKING:
    from .execute import Launch

Mask = ndarray | None  # of threads; None: all


class _Selected(NamedTuple):
    """The threads of one access: their addresses, flat, and how they lie in [programs, threads]."""

    address: ndarray
    shape: tuple[int, int]
    mask: Mask  # of that shape

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


class Accesses:
    """Some programs of a launch at once, and their memory."""

    def __init__(self, launch: "Launch", numbers: ndarray):
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
        self.steps = 0

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

    def _select(self, address: ndarray, mask: Mask, whole: bool) -> _Selected:
        shape = np.broadcast_shapes(
            address.shape, () if mask is None else mask.shape, self.shape if whole else ()
        )
        if mask is None:
            return _Selected(np.broadcast_to(address, shape).ravel(), shape, None)
        mask = np.broadcast_to(mask, shape)
        return _Selected(np.broadcast_to(address, shape)[mask], shape, mask)

    def _actors(self, space: str, selected: _Selected, site: int) -> Actors | None:
        """An address that threads share counts for all of them. In global memory a program is one actor: where a tile
        has fewer elements than threads, Triton lets several threads read an element, of which one writes it."""
        if not self.options.ordered:
            return None
        rows, columns = selected.shape
        who = self.identity[:, :1] if space == "global" else self.identity
        scope = (
            ANYWHERE
            if rows < self.count
            else THREAD
            if columns == self.size or space == "global"
            else IN_PROGRAM
        )
        values = (who, self.barriers, self.warp_barriers)
        return Actors(*(selected.flat(x[:rows, :columns]) for x in values), site, scope)

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

    def load(
        self, space: str, address: ndarray, mask: Mask, width: int, count: int, site: int
    ) -> list[ndarray]:
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
        found, problem = memory.read(place, width, count, self._actors(space, selected, site))
        if problem:
            self._fault(problem, site, selected)
        return [selected.spread(x) for x in found]

    def store(
        self,
        space: str,
        address: ndarray,
        values: Sequence[ndarray],
        mask: Mask,
        width: int,
        site: int,
    ) -> None:
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
        if problem := memory.write(place, width, flat, self._actors(space, selected, site)):
            self._fault(problem, site, selected)

    def _count(self, kind: str, address: ndarray, mask: Mask, size: int) -> None:
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

    def copy(self, to: ndarray, source: ndarray, size: int, reads: Mask, mask: Mask, site: int) -> None:
        """Nothing may touch the target until it is waited for: then, as late as allowed, it is written."""
        here = np.broadcast_to(np.ones((1, 1), bool) if mask is None else mask, self.shape)
        if reads is not None and not np.isin(np.broadcast_to(reads, self.shape)[here], (0, size)).all():
            raise Unknown(f"{self.kernel.where(self.launch.program.sites[site])}: a copy of a part")
        reading = here if reads is None else here & (reads != 0)
        width = min(size, 8)
        if reading.any():
            selected = self._select(source, reading, whole=True)
            place = self._locate("global", selected, size, site)
            if self.options.counting:
                self._count("loads", source, reading, size)
            _, problem = self.memory.read(place, width, size // width, self._actors("global", selected, site))
            if problem:
                self._fault(problem, site, selected)
        if not here.any():
            return
        selected, place = self._shared_place(to, here, size, site)
        if problem := self.shared.busy(place, size):
            self._fault(problem, site, selected)
        nothing = [np.full(len(selected.address), UNWRITTEN, np.uint8).astype(UNSIGNED[width])] * (
            size // width
        )
        if problem := self.shared.write(place, width, nothing, self._actors("shared", selected, site)):
            self._fault(problem, site, selected)
        self.shared.mark_arriving(place, size, True)
        whole = (np.broadcast_to(x, self.shape) for x in (to, source))
        self.copies.append(_Copy(*whole, size, reading, here.copy(), self.committed.copy(), site))

    def _shared_place(self, address: ndarray, mask: ndarray, size: int, site: int) -> tuple[_Selected, Place]:
        selected = self._select(address, mask, whole=True)
        return selected, self._locate("shared", selected, size, site)

    def commit_copies(self, mask: Mask) -> None:
        self.committed += 1 if mask is None else mask

    def wait_copies(self, allowed: int, mask: Mask, site: int) -> None:
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
        if problem := self.shared.write(place, width, flat, self._actors("shared", selected, copy.site)):
            self._fault(problem, copy.site, selected)


def _combined(name: str, kind: str, old: ndarray, *operands: ndarray) -> ndarray:
    if name == "exch":
        return operands[0]
    if name == "cas":
        return np.where(old == operands[0], operands[1], old)
    if name == "add" and kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return arithmetic.narrow("add", kind, old, operands[0])
    functions = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.fmin, "max": np.fmax,
    }  # fmt: skip
    return functions[name](old, operands[0])
