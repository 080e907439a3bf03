"""wgmma: products of four warps, whose operands lie in shared memory.

A product is made at once. Until it is waited for, nothing may write to what it reads.
"""

from collections.abc import Sequence

import numpy as np
from numpy import float32, ndarray, uint64

from . import matrix
from .accesses import Mask
from .memory import UNSIGNED, Place, Problem
from .races import IN_PROGRAM, WARP, Actors
from .warps import Warps

GROUP = 128  # threads


class Warpgroups(Warps):
    flights: list[list[tuple[Place, int]]]  # what products read, by group of products; the last group is open

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
        self.flights.append([])

    def wait_products(self, allowed: int, mask: Mask, site: int) -> None:
        self._warpgroups(mask, site)
        complete = max(0, len(self.flights) - 1 - allowed)
        for place, width in (read for group in self.flights[:complete] for read in group):
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
        return [self._sum(part, x, accumulates) for part, x in zip(parts, sums, strict=True)]

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
            actors = Actors(self.numbers[row] * self.size + GROUP * group, barriers, barriers, IN_PROGRAM)
        (bits,), problem = self.shared.read(place, width, 1, actors)
        check(problem)
        self.shared.mark_used(place, width, 1)
        self.flights[-1].append((place, width))
        result = np.zeros((*here.shape, *sizes), UNSIGNED[width])
        result[here] = bits.reshape(-1, *sizes)
        return matrix.values(result, kind)
