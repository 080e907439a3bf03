"""Which accesses to one address have nothing between them that puts them in order.

Memory is divided into granules, as small as the narrowest access of the kernel, so that two accesses meet in a granule
exactly if they share a byte. A granule remembers who wrote it last and who read it since, each as one thread, the
number of barriers that its program and its warp had passed, and a scope: whether it was this thread alone, or others
of its warp, its program or other programs as well.

Two accesses are in order if they are of one thread; of one program, with a barrier of the program between; or of one
warp, with a barrier of the warp between. Nothing orders two programs of a launch.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

WARP = 32
THREAD, IN_WARP, IN_PROGRAM, ANYWHERE = range(4)  # scopes


class Actors(NamedTuple):
    """Who accesses, one entry an access."""

    thread: ndarray  # its number in the launch: program * threads + thread
    barriers: ndarray  # that its program has passed
    warp_barriers: ndarray  # that its warp has passed, those of the program included
    site: int  # the instruction
    scope: int = THREAD  # wider: all threads of its warp, its program or the launch do the same

    def at(self, selected: ndarray) -> "Actors":
        each = self.thread[selected], self.barriers[selected], self.warp_barriers[selected]
        return Actors(*each, self.site, self.scope)


class _Last:
    """The last ones to do something to each granule."""

    def __init__(self, granules: int, threads: int):
        self.threads = threads
        self.thread = np.full(granules, -1, np.int64)
        self.barriers = np.zeros(granules, np.int32)
        self.warp_barriers = np.zeros(granules, np.int32)
        self.scope = np.zeros(granules, np.int8)
        self.site = np.full(granules, -1, np.int32)

    def unordered(self, granule: ndarray, actors: Actors) -> ndarray:
        """Where nothing orders the last ones before these."""
        thread, scope = self.thread[granule], np.maximum(self.scope[granule], actors.scope)
        open_ = (thread >= 0) & ~((thread == actors.thread) & (scope == THREAD))
        if not open_.any():
            return open_
        warp = (thread // WARP == actors.thread // WARP) & (scope <= IN_WARP)
        open_ &= ~(warp & (self.warp_barriers[granule] < actors.warp_barriers))
        program = (thread // self.threads == actors.thread // self.threads) & (scope <= IN_PROGRAM)
        return open_ & ~(program & (self.barriers[granule] < actors.barriers))

    def record(self, granule: ndarray, actors: Actors) -> None:
        joins = self.unordered(granule, actors)
        scope = np.full(len(granule), actors.scope, np.int8)
        if joins.any():
            old = np.maximum(self.scope[granule[joins]], self._relation(granule[joins], actors.at(joins)))
            scope[joins] = np.maximum(scope[joins], old)
        self.thread[granule] = actors.thread
        self.barriers[granule] = actors.barriers
        self.warp_barriers[granule] = actors.warp_barriers
        self.scope[granule] = THREAD
        self.site[granule] = actors.site
        beside = self.thread[granule] != actors.thread  # several at once: the last one is remembered
        if beside.any():
            scope[beside] = np.maximum(scope[beside], self._relation(granule[beside], actors.at(beside)))
        for level in (IN_WARP, IN_PROGRAM, ANYWHERE):  # the widest stays
            self.scope[granule[scope == level]] = level

    def _relation(self, granule: ndarray, actors: Actors) -> ndarray:
        thread = self.thread[granule]
        same_warp = thread // WARP == actors.thread // WARP
        same_program = thread // self.threads == actors.thread // self.threads
        within = np.where(same_warp, IN_WARP, np.where(same_program, IN_PROGRAM, ANYWHERE))
        return np.where(thread == actors.thread, THREAD, within).astype(np.int8)


class Race(NamedTuple):
    place: int  # of the access, among those that were checked
    other: int  # the number of a thread that does it, too
    does: str  # what that thread did


class Shadow:
    """What is remembered of some memory. ``threads`` of a program."""

    def __init__(self, granules: int, threads: int):
        self.writes, self.reads = _Last(granules, threads), _Last(granules, threads)

    def read(self, granule: ndarray, actors: Actors) -> Race | None:
        race = self._first(self.writes, granule, actors, "wrote")
        self.reads.record(granule, actors)
        return race

    def write(self, granule: ndarray, actors: Actors, changes: ndarray, loses: ndarray) -> Race | None:
        """Threads of one program may write the same value with one instruction: where a tile has fewer elements than
        threads, Triton gives an element to several threads, and all of them write it. changes: which threads write
        another value than what lay there; loses: than what lies there afterwards, as others write at once."""
        race = self._first(self.reads, granule, actors, "read") or self._overwritten(granule, actors, changes)
        self.writes.record(granule, actors)
        return race or self._at_once(granule, actors, loses)

    def _first(self, last: _Last, granule: ndarray, actors: Actors, does: str) -> Race | None:
        unordered = last.unordered(granule, actors)
        if not unordered.any():
            return None
        place = int(unordered.argmax())
        return Race(place, int(last.thread[granule[place]]), does)

    def _overwritten(self, granule: ndarray, actors: Actors, changes: ndarray) -> Race | None:
        unordered = self.writes.unordered(granule, actors)
        if not unordered.any():
            return None
        elsewhere = self.writes.thread[granule] // self.writes.threads != actors.thread // self.writes.threads
        unordered &= changes | elsewhere | (self.writes.site[granule] != actors.site)
        if not unordered.any():
            return None
        place = int(unordered.argmax())
        return Race(place, int(self.writes.thread[granule[place]]), "wrote")

    def _at_once(self, granule: ndarray, actors: Actors, loses: ndarray) -> Race | None:
        winner = self.writes.thread[granule]
        elsewhere = winner // self.writes.threads != actors.thread // self.writes.threads
        lost = (winner != actors.thread) & (loses | elsewhere)
        if not lost.any():
            return None
        place = int(lost.argmax())
        return Race(place, int(winner[place]), "writes")
