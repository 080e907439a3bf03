"""What an optimizer keeps between two steps: which parameters are stepped where, and by what to know them again."""

import operator
import weakref
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.multi_tensor import addresses, upload
from fastreg.ops.optimizers import NUMBERS, WIDTH, Batch, Numbers, same_layout
from fastreg.optim.distributed import is_distributed


class Plan:
    """Which parameters are stepped where, and by what this may be recognised in the next step. Holds no gradient."""

    def __init__(self, structure: tuple, params: list[Tensor], state: dict):
        self.structure, self.params, self.state = structure, params, state
        self.distributed = any(is_distributed(p) for p in params)
        self.batches: list[Placed] = []
        self.rest: list[int] = []  # places of parameters that no kernel takes
        self.torch: dict[int, list[int]] = {}  # and of those that torch's own step can take, by group
        self.walks: dict[int, bool] = {}  # whose memory may be walked over, but for the gradients
        self.sums: list = []  # by what shards the norm of the gradients is summed, in an order all processes share
        self.copies = False  # some gradient has another layout than its parameter
        self.written: list[Tensor] = []  # by kernels, behind the back of autograd

    def remember(self, grads: list[Tensor | None], pieces: list[Tensor]) -> None:
        self.gradients = _weakly(grads)
        self.gradient_addresses = addresses(grads)
        self.addresses = addresses(pieces)
        self.dicts = [self.state[p] for p in self.params if p in self.state]
        self.values = list(self._state_tensors())

    def _state_tensors(self):
        """All values of the state, and None, by which an end that comes early is noticed."""
        return chain(chain.from_iterable(map(dict.values, self.dicts)), (None,))

    def has_all_but_gradients(self, structure: tuple, pieces: list[Tensor], state: dict) -> bool:
        return (
            structure == self.structure
            and state is self.state
            and addresses(pieces) == self.addresses
            and all(map(operator.is_, self._state_tensors(), self.values))
        )

    def follow(self, grads: list[Tensor | None], pieces: list[Tensor]) -> bool:
        """Takes up new gradients in the place of the old ones. False where they are not of the same kind."""
        found = addresses(grads)
        moved = found != self.gradient_addresses
        if moved and [a == -1 for a in found] != [a == -1 for a in self.gradient_addresses]:
            return False
        if not same(grads, [None if r is None else r() for r in self.gradients]):
            if any(g is not None and g.layout != torch.strided for g in grads) or not all(
                _fits(grads[i], pieces[i], batch.dtypes[1]) for batch in self.batches for i in batch.places
            ):
                return False
            self.gradients = _weakly(grads)
        if moved:
            for batch in self.batches:
                batch.move_gradients([found[i] for i in batch.places])
            self.gradient_addresses = found
        return not self.copies


class Placed(Batch):
    """A batch with the places of its parameters in the optimizer, and the numbers of its groups on the device."""

    places: list[int]
    clips: bool  # its gradients are of the global norm
    key: Any  # what shards they are of
    _written: tuple | None = None

    def numbers_on_device(self, numbers: list[Numbers]) -> Tensor:
        """fp64 ``[groups, WIDTH]``, written where they have changed; what lies on the device is copied there."""
        found = [[getattr(numbers[group], name) for name in NUMBERS] for group in self.groups]
        there = [
            (row, column, value)
            for row, values in enumerate(found)
            for column, value in enumerate(values)
            if isinstance(value, Tensor) and value.device == self.device and value.is_cuda
        ]
        for row, column, _ in there:
            found[row][column] = 0.0
        written = tuple(tuple(map(float, values)) for values in found)
        if written != self._written:
            padded = [(*values, *(0.0,) * (WIDTH - len(values))) for values in written]
            self._on_device, self._written = upload(padded, self.device, torch.float64), written
        for row, column, value in there:
            self._on_device[row, column].copy_(value.reshape(()))
        return self._on_device


def _fits(g: Tensor, piece: Tensor, dtype: torch.dtype) -> bool:
    return g.dtype == dtype and g.layout == torch.strided and backend.is_plain(g) and same_layout(g, piece)


def _weakly(grads: list[Tensor | None]) -> list:
    return [None if g is None else weakref.ref(g) for g in grads]


def same(found: list, expected: list) -> bool:
    return len(found) == len(expected) and all(map(operator.is_, found, expected))
