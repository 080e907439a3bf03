"""What a launch did, counted exactly: instructions, bytes, sectors, bank conflicts."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray, uint64

SECTOR = 32  # bytes that device memory and the caches move at once
BANKS, WORD = 32, 4


@dataclass
class Traffic:
    """What the loads, or the stores, ask of global memory; a request is one instruction of one warp."""

    requests: int = 0
    bytes: int = 0  # of all threads
    distinct: int = 0  # bytes, where threads of one request share an address only once
    sectors: int = 0
    fewest: int = 0  # sectors that these bytes would need if they lay together


@dataclass
class Counters:
    instructions: Counter[str] = field(default_factory=Counter)  # of warps, by opcode
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    shared: Traffic = field(default_factory=Traffic)
    conflicts: int = 0  # turns that shared memory takes beyond one for each 128 bytes of a request
    touched: dict[str, list[ndarray]] = field(default_factory=lambda: {"loads": [], "stores": []})  # sectors
    _blocks: dict[int, Counter[str]] = field(default_factory=dict)

    def ran(self, block, number: int, warps: int) -> None:
        opcodes = self._blocks.get(number) or self._blocks.setdefault(number, block.opcodes())
        for opcode, count in opcodes.items():
            self.instructions[opcode] += count * warps

    def accessed(self, kind: str, address: ndarray, mask: ndarray | None, size: int) -> None:
        """address: [requests, 32]"""
        if mask is None:
            mask = np.ones(address.shape, bool)
        here = mask.any(-1)
        address, mask = address[here], mask[here]
        traffic: Traffic = getattr(self, kind)
        distinct = _distinct(address, mask)
        traffic.requests += len(address)
        traffic.bytes += int(mask.sum()) * size
        traffic.distinct += int(distinct.sum()) * size
        if kind == "shared":
            self.conflicts += _conflicts(address, mask, size)
        else:
            traffic.sectors += int(_distinct(address // uint64(SECTOR), mask).sum())
            traffic.fewest += int((-(-distinct * size // SECTOR)).sum())
            self.touched[kind].append(np.unique(address[mask] // uint64(SECTOR)))

    def moved(self, start: int, end: int) -> tuple[int, int]:
        """Bytes of the different sectors between two addresses that were read, and of those that were written."""
        return self._moved(self.touched["loads"], start, end), self._moved(self.touched["stores"], start, end)

    def _moved(self, sectors: list[ndarray], start: int, end: int) -> int:
        found = np.unique(np.concatenate([*sectors, np.zeros(0, uint64)]))
        return SECTOR * int(((found >= start // SECTOR) & (found < -(-end // SECTOR))).sum())


def _distinct(values: ndarray, mask: ndarray) -> ndarray:
    """How many different values each row has."""
    nothing = np.iinfo(values.dtype).max
    ordered = np.sort(np.where(mask, values, nothing), axis=-1)
    first = ordered[:, :1] != nothing
    return (
        first.sum(-1) + ((ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] != nothing)).sum(-1)
    ).astype(np.int64)


def _conflicts(address: ndarray, mask: ndarray, size: int) -> int:
    """Threads that want different words of one bank take turns. Of 8 bytes a half, of 16 a quarter of a warp comes at
    once."""
    words = max(1, size // WORD)
    lanes = address.shape[1] // words
    address, mask = address.reshape(-1, lanes), mask.reshape(-1, lanes)
    word = address[..., None] // uint64(WORD) + np.arange(words, dtype=uint64)
    word = np.sort(
        np.where(mask[..., None], word, np.iinfo(np.uint64).max).reshape(len(address), -1), axis=-1
    )
    new = np.concatenate([np.ones((len(word), 1), bool), word[:, 1:] != word[:, :-1]], axis=1)
    new &= word != np.iinfo(np.uint64).max
    row, column = np.nonzero(new)
    turns = np.zeros((len(word), BANKS), np.int64)
    np.add.at(turns, (row, (word[row, column] % uint64(BANKS)).astype(np.int64)), 1)
    return int(np.maximum(turns.max(-1) - 1, 0).sum())
