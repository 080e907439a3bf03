"""wgmma: products of four warps, whose operands lie in shared memory.

A product is made at once. Until it is waited for, nothing may write to what it reads, or compute with what it writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import float32, ndarray, uint64

from . import matrix
from .accesses import Mask
from .memory import UNSIGNED, Place, Problem
from .races import IN_PROGRAM, WARP, Actors
from .warps import Warps

GROUP = 128  # threads


@dataclass
class Flight:
    """A group of products, which are waited for together."""

    reads: list[tuple[Place, int]] = field(default_factory=list)
    landed: bool = False


class Early(Exception):
    """Something came before what it has to wait for."""


class Accumulators(ndarray):
    """A register that products write. It may be moved, and accumulate more; until they have landed nothing else."""

    flights: tuple[Flight, ...] = ()

    def __array_finalize__(self, origin: Any) -> None:
        self.flights = getattr(origin, "flights", ())

    def __array_ufunc__(self, function, method, *inputs, **more):
        return getattr(function, method)(*map(_landed, inputs), **more)

    def __array_function__(self, function, types, inputs, more):
        if function is np.where and len(inputs) == 3:  # a move of some threads
            flights = tuple(flight for x in inputs for flight in getattr(x, "flights", ()))
            return in_flight(np.where(*map(plain, inputs)), *flights)
        return function(*map(_landed, inputs), **more)


def plain(x: Any) -> Any:
    return x.view(ndarray) if isinstance(x, Accumulators) else x


def in_flight(x: ndarray, *flights: Flight) -> Accumulators:
    x = x.view(Accumulators)
    x.flights = flights
    return x


def _landed(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(map(_landed, x))
    if isinstance(x, Accumulators) and not all(flight.landed for flight in x.flights):
        raise Early("reads what a product still writes: nothing waited for it")
    return plain(x)


class Warpgroups(Warps):
    flights: list[Flight]  # the last one is open

    def _warpgroups(self, mask: Mask, site: int) -> ndarray:
        """Which warpgroups are here, [programs, warpgroups]: with all of their threads."""
        if self.size % GROUP:
            self._fail(site, f"a warpgroup has {GROUP} threads")
        here = np.broadcast_to(np.ones((1, 1), bool) if mask is None else mask, self.shape)
        here = here.reshape(self.count, -1, GROUP)
        if (here.any(-1) != here.all(-1)).any():
            self._fail(site, "some threads of a warpgroup are not here")
        return here.all(-1)

    def fence_products(self, mask: Mask, site: int) -> None:
        self._warpgroups(mask, site)

    def commit_products(self, mask: Mask, site: int) -> None:
        self._warpgroups(mask, site)
        self.flights.append(Flight())

    def wait_products(self, allowed: int, mask: Mask, site: int) -> None:
        self._warpgroups(mask, site)
        complete = max(0, len(self.flights) - 1 - allowed)
        for flight in self.flights[:complete]:
            flight.landed = True
            for place, width in flight.reads:
                self.shared.mark_used(place, width, -1)
        self.flights = self.flights[complete:]

    def warpgroup_product(
        self, shape: str, kind: str, a, b, sums, accumulates, signs, transposed, mask: Mask, site: int
    ) -> list[ndarray]:
        here = self._warpgroups(mask, site)
        rows, columns, depth = matrix.sizes(shape)
        if isinstance(a, tuple):
            registers = [np.broadcast_to(x, self.shape).reshape(*here.shape, GROUP // WARP, WARP) for x in a]
            left = matrix.left_of_registers(registers, kind)
        else:
            left = self._operand(a, (rows, depth), kind, not transposed[0], here, site)
        right = self._operand(b, (columns, depth), kind, not transposed[1], here, site)
        product = signs[0] * signs[1] * (left @ right.swapaxes(-1, -2))
        parts = matrix.of_accumulators(product, self.shape)
        found = [self._sum(part, plain(x), accumulates) for part, x in zip(parts, sums, strict=True)]
        return [in_flight(x, self.flights[-1]) for x in found]

    def _sum(self, part: ndarray, old: ndarray, accumulates: ndarray) -> ndarray:
        return (part + np.where(accumulates, old, float32(0))).astype(float32)

    def _operand(
        self,
        descriptor: ndarray,
        sizes: Sequence[int],
        kind: str,
        along_depth: bool,
        here: ndarray,
        site: int,
    ) -> ndarray:
        """A matrix [lines, depth] in shared memory, for every warpgroup that is here; for others zeros."""
        named = np.broadcast_to(descriptor, self.shape).reshape(*here.shape, GROUP)[here]
        if (named != named[:, :1]).any():
            self._fail(site, "the threads of a warpgroup name different matrices")
        width = 4 if kind == "tf32" else 2
        address = matrix.addresses(named[:, 0], *sizes, width, along_depth)
        row, group = (np.repeat(x, sizes[0] * sizes[1]) for x in np.nonzero(here))
        flat = address.ravel().astype(uint64)

        def check(found: Place | Problem | None) -> None:
            if isinstance(found, Problem):
                at = found.place
                self._fail(site, found.what, int(row[at]), GROUP * int(group[at]), int(flat[at]))

        place = self.shared.locate(flat, width, row)
        check(place)
        check(self.shared.unready(place, width))
        actors = None
        if self.options.ordered:
            barriers = self.barriers[row, 0]
            actors = Actors(
                self.numbers[row] * self.size + GROUP * group, barriers, barriers, site, IN_PROGRAM
            )
        (bits,), problem = self.shared.read(place, width, 1, actors)
        check(problem)
        self.shared.mark_used(place, width, 1)
        self.flights[-1].reads.append((place, width))
        result = np.zeros((*here.shape, *sizes), UNSIGNED[width])
        result[here] = bits.reshape(-1, *sizes)
        return matrix.values(result, kind)
