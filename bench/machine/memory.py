"""Global, shared and local memory: where bytes lie, and what may touch them.

Every access is checked before it happens: aligned to its width, inside a tensor of the launch (or the declared shared
memory), initialized where it is shared, and in order with all others (:mod:`.races`).
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray, uint64

from .races import Actors, Race, Shadow

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
UNWRITTEN = 0xCD  # what lies where nothing was written


class Fault(Exception):
    """Something that a kernel must not do."""


class Problem(NamedTuple):
    """A fault of one access, which the caller tells with kernel, line and thread."""

    place: int  # among the accesses
    what: str
    other: int | None = None  # a thread that races with it


class Buffer:
    """Bytes, read and written by index in units of 1, 2, 4 and 8 bytes."""

    def __init__(self, octets: ndarray):
        self.units = {width: octets.view(kind) for width, kind in UNSIGNED.items()}

    def gather(self, at: ndarray, width: int, count: int) -> list[ndarray]:
        index = at >> _SHIFT[width]
        return [self.units[width][index + k] for k in range(count)]

    def scatter(self, at: ndarray, width: int, values: Sequence[ndarray]) -> None:
        index = at >> _SHIFT[width]
        for k, value in enumerate(values):
            self.units[width][index + k] = value

    def differs(self, at: ndarray, width: int, values: Sequence[ndarray]) -> ndarray:
        """Which of these accesses have another value than what lies there."""
        found = self.gather(at, width, len(values))
        return np.any([here != value for here, value in zip(found, values, strict=True)], axis=0)


class Region(NamedTuple):
    """A tensor: its first byte and the one behind its last."""

    start: int
    end: int
    name: str


_FIRST = 1 << 12  # below lies nothing
_EVERYTHING = Buffer(np.frombuffer((ctypes.c_uint8 * ((1 << 47) - _FIRST)).from_address(_FIRST), np.uint8))


class Place(NamedTuple):
    """Where accesses go, after they were checked."""

    index: ndarray  # of their first bytes, in the buffer
    granule: ndarray  # their first granules


class _Ordered:
    """Memory whose accesses have to be in order."""

    buffer: Buffer
    shadow: Shadow | None
    granule: int

    def _granules(self, place: Place, size: int) -> list[ndarray]:
        return [place.granule + k for k in range(max(1, size // self.granule))]

    def read(
        self, place: Place, width: int, count: int, actors: Actors | None
    ) -> tuple[list[ndarray], Problem | None]:
        problem = None
        if self.shadow is not None and actors is not None:
            for granule in self._granules(place, width * count):
                problem = problem or _told(self.shadow.read(granule, actors), "reads")
        return self.buffer.gather(place.index, width, count), problem

    def write(
        self, place: Place, width: int, values: Sequence[ndarray], actors: Actors | None
    ) -> Problem | None:
        if self.shadow is None or actors is None:
            self.buffer.scatter(place.index, width, values)
            return None
        changes = self.buffer.differs(place.index, width, values)
        self.buffer.scatter(place.index, width, values)
        loses = self.buffer.differs(place.index, width, values)
        problem = None
        for granule in self._granules(place, width * len(values)):
            problem = problem or _told(self.shadow.write(granule, actors, changes, loses), "writes")
        return problem


def _told(race: Race | None, does: str) -> Problem | None:
    if race is None:
        return None
    return Problem(race.place, f"{does} what another thread {race.does} with nothing between", race.other)


class Global(_Ordered):
    """The memory of the process, of which a launch may touch the tensors it was given."""

    buffer = _EVERYTHING

    def __init__(
        self,
        regions: Sequence[Region],
        granule: int,
        threads: int,
        ordered: bool,
        freed: Sequence[Region] = (),
    ):
        self.regions, self.freed, self.granule = sorted(regions), freed, granule
        starts, ends = [], []
        for region in self.regions:
            if region.start == region.end:
                continue
            if ends and region.start < ends[-1]:  # views of one tensor
                ends[-1] = max(ends[-1], region.end)
            else:
                starts.append(region.start)
                ends.append(region.end)
        self.starts, self.ends = np.array(starts, uint64), np.array(ends, uint64)
        sizes = [-(-end // granule) - start // granule for start, end in zip(starts, ends, strict=True)]
        self._shift = np.array(
            [o - s // granule for o, s in zip(np.cumsum([0, *sizes]), starts, strict=False)], np.int64
        )
        self.shadow = Shadow(sum(sizes), threads) if ordered else None

    def locate(self, address: ndarray, size: int) -> Place | Problem:
        if size > 1 and (wrong := address & uint64(size - 1)).any():
            return Problem(int((wrong != 0).argmax()), f"is not aligned to {size} bytes")
        if not len(self.starts):
            return Problem(0, "is in no tensor")
        span = np.searchsorted(self.starts, address, "right") - 1
        inside = (span >= 0) & (address + uint64(size) <= self.ends[span])
        if not inside.all():
            first = int((~inside).argmax())
            return Problem(first, self._missed(int(address[first]), size))
        address = address.astype(np.int64)
        return Place(address - _FIRST, address // self.granule + self._shift[span])

    def _missed(self, address: int, size: int) -> str:
        for region in self.freed:
            if region.start <= address < region.end:
                return f"is in freed memory: it was {region.name}"
        nearest = min(self.regions, key=lambda r: max(r.start - address, address + size - r.end))
        return (
            f"is out of bounds: {nearest.name} is the nearest tensor, of {nearest.end - nearest.start} bytes; "
            f"the access of {size} begins at its byte {address - nearest.start}"
        )

    def touched(self) -> tuple[int, int]:
        """How many different bytes were read, and written."""
        assert self.shadow is not None
        return tuple(
            self.granule * int((last.thread >= 0).sum()) for last in (self.shadow.reads, self.shadow.writes)
        )


class Shared(_Ordered):
    """The shared memory of some programs, one after another."""

    def __init__(self, programs: int, size: int, granule: int, threads: int, ordered: bool):
        self.programs, self.size, self.granule = programs, -(-size // 16) * 16, granule
        octets = np.full(programs * self.size + 16, UNWRITTEN, np.uint8)
        begin = -octets.ctypes.data % 16
        self.octets = octets[begin : begin + programs * self.size]
        self.buffer = Buffer(self.octets)
        self.written = np.zeros(len(self.octets) // granule, bool)
        # What asynchronous operations still do: none may read what a copy writes, or write what a product reads.
        self.arriving = np.zeros(len(self.octets) // granule, bool)
        self.used = np.zeros(len(self.octets) // granule, np.int32)
        self.shadow = Shadow(len(self.octets) // granule, threads) if ordered else None

    def locate(self, address: ndarray, size: int, program: ndarray) -> Place | Problem:
        if size > 1 and (wrong := address & uint64(size - 1)).any():
            return Problem(int((wrong != 0).argmax()), f"is not aligned to {size} bytes")
        outside = address + uint64(size) > self.size
        if outside.any():
            return Problem(int(outside.argmax()), f"is outside of the {self.size} bytes of shared memory")
        index = address.astype(np.int64) + program * self.size
        return Place(index, index // self.granule)

    def unready(self, at: Place, size: int) -> Problem | None:
        """The first of these that nothing wrote, or that is still being copied."""
        for granule in self._granules(at, size):
            if not (ready := self.written[granule]).all():
                return Problem(int((~ready).argmax()), "is shared memory that nothing wrote")
            if (busy := self.arriving[granule]).any():
                return Problem(int(busy.argmax()), "is shared memory that a copy still writes")
        return None

    def busy(self, at: Place, size: int) -> Problem | None:
        """The first that an asynchronous operation still reads or writes."""
        for granule in self._granules(at, size):
            if (busy := self.arriving[granule] | (self.used[granule] > 0)).any():
                return Problem(int(busy.argmax()), "is shared memory that a copy or a product still uses")
        return None

    def mark_arriving(self, at: Place, size: int, arriving: bool) -> None:
        for granule in self._granules(at, size):
            self.arriving[granule] = arriving

    def mark_used(self, at: Place, size: int, by: int) -> None:
        for granule in self._granules(at, size):
            np.add.at(self.used, granule, by)

    def write(
        self, place: Place, width: int, values: Sequence[ndarray], actors: Actors | None
    ) -> Problem | None:
        problem = super().write(place, width, values, actors)
        for granule in self._granules(place, width * len(values)):
            self.written[granule] = True
        return problem


class Local:
    """A stack for each thread."""

    def __init__(self, lanes: int, size: int):
        self.size = size
        self.buffer = Buffer(np.full(lanes * size, UNWRITTEN, np.uint8))

    def locate(self, address: ndarray, size: int, lane: ndarray) -> Place | Problem:
        if size > 1 and (wrong := address & uint64(size - 1)).any():
            return Problem(int((wrong != 0).argmax()), f"is not aligned to {size} bytes")
        outside = address + uint64(size) > self.size
        if outside.any():
            return Problem(int(outside.argmax()), f"is outside of the {self.size} bytes of local memory")
        index = address.astype(np.int64) + lane * self.size
        return Place(index, index)
