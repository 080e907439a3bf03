"""What the lanes of a warp do together: exchanges, votes, reductions, matrices in their registers."""

import numpy as np
from numpy import int64, ndarray, uint32

from . import matrix
from .accesses import Accesses, Mask
from .races import WARP
from .translate import also


class Warps(Accesses):
    def lanes(self, side: str) -> ndarray:
        """%lanemask_lt and its like."""
        bit = uint32(1) << self.lane
        below = bit - uint32(1)
        return {"eq": bit, "lt": below, "le": below | bit, "gt": ~(below | bit), "ge": ~below}[side]

    def _members(self, members: ndarray, mask: Mask, site: int) -> ndarray:
        """Which lanes take part, [programs, warps, 32]: those that are named, which all have to be there."""
        here = np.ones((1, 1, WARP), bool) if mask is None else self.by_warp(mask)
        if members.size == 1 and members[0, 0] == 0xFFFFFFFF:
            named = np.ones((1, 1, WARP), bool)
        else:
            named = (self.by_warp(members) >> np.arange(WARP, dtype=uint32)) & uint32(1) != 0
        wrong = here.any(-1, keepdims=True) & (named != here)
        if wrong.any():
            row, warp, lane = (
                int(x[0]) for x in np.nonzero(np.broadcast_to(wrong, (self.count, self.warps, WARP)))
            )
            self._fail(site, "the lanes that are named are not those that are here", row, warp * WARP + lane)
        return here & named

    def warp_barrier(self, members: ndarray, mask: Mask, site: int) -> None:
        here = self._members(members, mask, site).any(-1, keepdims=True)
        self.warp_barriers += np.broadcast_to(here, (self.count, self.warps, WARP)).reshape(self.shape)

    def shuffle(self, mode, x, by, limits, members, mask, site: int) -> tuple[ndarray, ndarray]:
        self._members(members, mask, site)
        lane, by = self.lane.astype(int64), (by & uint32(31)).astype(int64)
        segment, clamp = (
            ((limits >> uint32(8)) & uint32(31)).astype(int64),
            (limits & uint32(31)).astype(int64),
        )
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

    def reduce(self, name: str, x: ndarray, members: ndarray, mask: Mask, site: int) -> ndarray:
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

    def vote(self, mode: str, p: ndarray, members: ndarray, mask: Mask, site: int) -> ndarray:
        taking = self._members(members, mask, site)
        p = self.by_warp(p)
        if mode == "ballot":
            bits = (p & taking).astype(uint32) << np.arange(WARP, dtype=uint32)
            return np.repeat(np.bitwise_or.reduce(bits, axis=-1), WARP, axis=1)
        any_, all_ = (p & taking).any(-1), (p | ~taking).all(-1)
        found = {"any": any_, "all": all_, "uni": all_ | ~any_}[mode]
        return np.repeat(found, WARP, axis=1)

    def active(self, mask: Mask) -> ndarray:
        here = self.by_warp(np.ones((1, 1), bool) if mask is None else mask)
        bits = here.astype(uint32) << np.arange(WARP, dtype=uint32)
        return np.repeat(np.bitwise_or.reduce(bits, axis=-1), WARP, axis=1)

    def elect(self, members: ndarray, mask: Mask, site: int) -> tuple[ndarray, ndarray]:
        """The lowest lane that takes part, and whether this is it."""
        taking = np.broadcast_to(self._members(members, mask, site), (self.count, self.warps, WARP))
        lowest = np.repeat(taking.argmax(-1), WARP, axis=1).astype(uint32)
        return lowest, self.lane == lowest

    # --- matrices

    def _whole_warps(self, mask: Mask, site: int) -> Mask:
        """Which warps, [programs, warps]; all of their lanes have to be there."""
        if mask is None:
            return None
        self._members(np.full((1, 1), 0xFFFFFFFF, uint32), mask, site)
        return self.by_warp(mask).any(-1)

    def load_matrices(
        self, address: ndarray, count: int, transposed: bool, mask: Mask, site: int
    ) -> list[ndarray]:
        """Lane 8 k + r has the address of row r of matrix k; it reads the row, and all lanes get their parts."""
        self._whole_warps(mask, site)
        rows = also(mask, self.lane < uint32(8 * count))
        words = self.load("shared", np.broadcast_to(address, self.shape), rows, 4, 4, site)
        octets = np.stack([self.by_warp(word) for word in words], -1)[:, :, : 8 * count]
        elements = np.ascontiguousarray(octets).view(np.uint16).reshape(self.count, self.warps, count, 8, 8)
        found = matrix.fragments(elements, transposed)
        return [found[:, :, k].reshape(self.shape) for k in range(count)]

    def store_matrices(self, address: ndarray, values, transposed: bool, mask: Mask, site: int) -> None:
        self._whole_warps(mask, site)
        count = len(values)
        elements = matrix.rows(np.stack([self.by_warp(x) for x in values], 2), transposed)
        words = np.ascontiguousarray(elements).view(uint32).reshape(self.count, self.warps, 8 * count, 4)
        words = np.tile(words, (1, 1, 4 // count, 1)).reshape(*self.shape, 4)
        rows = also(mask, self.lane < uint32(8 * count))
        self.store("shared", address, [words[..., k] for k in range(4)], rows, 4, site)

    def product(self, shape: str, kind: str, a, b, c, mask: Mask, site: int) -> list[ndarray]:
        self._whole_warps(mask, site)
        a, b, c = ([self.by_warp(x) for x in operand] for operand in (a, b, c))
        return [x.reshape(self.shape) for x in matrix.product(shape, kind, a, b, c)]
