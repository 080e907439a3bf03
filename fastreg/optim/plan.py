"""The plan that an optimizer keeps between two steps: where each parameter is stepped, and how to recognize it."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.kinds import kinds_of
from fastreg.ops.multi_tensor.bulk import Watch, addresses, equal
from fastreg.ops.multi_tensor.optimizers import NUMBERS, WIDTH, Batch, Member, Numbers, Rule, same_strides
from fastreg.ops.multi_tensor.tables import upload
from fastreg.optim.distributed import is_distributed


class Listed(NamedTuple):
    """Parameters that are stepped in one call of ``ops.foreach.step_``."""

    owner: int  # their group
    rule: Rule
    dtype: torch.dtype
    over: Any  # the processes over which the max-norm of each goes
    key: Any  # those over which the norm of their gradients is summed


class Plan:
    """Where each parameter is stepped, and how the next step recognizes that nothing has changed.

    Holds neither gradients nor state: who moves them to another device gets their memory back.
    """

    def __init__(self, structure: tuple, params: list[Tensor], owners: list[int], sums: list):
        """owners: of each parameter its group. sums: by what shards the norm of the gradients is summed, in an order
        that all processes share."""
        self.structure, self.params, self.owners, self.sums = structure, params, owners, sums
        self.distributed = any(is_distributed(p) for p in params)
        self.batches: list[Placed] = []
        self.lists: dict[Listed, list[int]] = {}  # places of parameters that are stepped in lists,
        self.torch: dict[int, list[int]] = {}  # of those that take another step of torch, by group,
        self.rest: list[int] = []  # and of those that take the definition
        self.copies = False  # some gradient has another layout than its parameter
        self.written: list[Tensor] = []  # parameters that are written behind the back of autograd
        self.averages: list[weakref.ref[Tensor]] = []  # and averages

    def add_batches(self, batches: dict[tuple, tuple[list[Member], list[int]]], copies: bool) -> None:
        """batches: the members of each kind, which ends with (over, clips, key), and their places.
        copies: some gradients are laid out anew, as copies that live until the step is over."""
        self.copies = copies
        for (rule, *_, over, clips, key), (members, places) in batches.items():
            self.batches.append(Placed(rule, members, over, places, clips, key, copies))
            self.written += [m.parameter for m in members if not m.parameter.is_inference()]
            averages = (m.average for m in members if m.average is not None)
            self.averages += [weakref.ref(average) for average in averages if not average.is_inference()]

    def add_listed(self, kind: Listed, place: int) -> None:
        p = self.params[place]
        self.lists.setdefault(kind, []).append(place)
        self.written += [] if p.is_inference() else [p]

    def remember(self, grads: list[Tensor | None], pieces: list[Tensor], state: dict) -> None:
        self._kept = Watch(self.params, state.values())
        self._gradients: Watch | None = Watch(grads)
        self._absent = [g is None for g in grads]
        self._kinds: Any = None
        # What tables point to, batch after batch, and what torch's fused step walks over.
        launched = [(i, batch.form.dtypes[1]) for batch in self.batches for i in batch.places]
        walked = [(i, pieces[i].dtype) for places in self.lists.values() for i in places]
        self._places = [i for i, _ in launched + walked]
        self._launched = len(launched)
        self._whole = self._places == list(range(len(grads)))
        placed = self._placed(pieces)
        dtypes = (dtype for _, dtype in launched + walked)
        self._wanted = [(x.shape, x.stride(), dtype) for x, dtype in zip(placed, dtypes, strict=True)]
        self._addresses = addresses(placed[: self._launched])
        self._walked = kinds_of(placed[self._launched :])
        self._state_addresses = addresses([], dicts=state.values() if self.batches else ())
        self._gradient_addresses = addresses(self._placed(grads)[: self._launched])

    def _placed(self, tensors: list) -> list:
        return tensors if self._whole else [tensors[i] for i in self._places]

    def keep(self) -> None:
        """Keeps the tables that a CUDA graph reads while a parameter lives that it steps: nobody says when it ends.

        What is made while it is recorded is in its own pool, and not to be kept.
        """
        if self.batches:
            first = self.params[self.batches[0].places[0]]
            weakref.finalize(first, tuple, [{**vars(batch)} for batch in self.batches]).atexit = False

    def knows(self, structure: tuple, params: list[Tensor], state: dict) -> bool:
        """Whether the plan was made for these parameters, options and state."""
        if structure != self.structure or not self._kept.finds(params, state.values()):
            return False
        # Who moves the state of a parameter, as by ``x.data = x.data.cuda()``, moves all of it.
        return not self.batches or equal(addresses([], True, state.values()), self._state_addresses)

    def follow(self, grads: list[Tensor | None], pieces: list[Tensor]) -> bool:
        """Takes up new gradients in the place of the old ones. False where they are not of the same kind, or the
        parameters have moved."""
        known = self._gradients is not None and self._gradients.finds(grads)
        if not known:
            if [g is None for g in grads] != self._absent:
                return False
            ours = self._placed(grads)
            if len(ours) < len(grads) and any(g is not None and g.layout != torch.strided for g in grads):
                return False
            alike = self._kinds is not None and self._kinds.check(*ours)
            if not alike and not self._fit(grads):
                return False
            if self._kinds is None:
                self._kinds = kinds_of(ours)
            known = alike and len(ours) == len(grads)
            # Who replaces gradients does so in every step (``zero_grad``): from now on their kind is asked at once.
            self._gradients = None
        placed = self._placed(pieces)
        if not self._walked.check(*placed[self._launched :]):
            return False
        if not self.batches:
            return True
        if not equal(addresses(placed[: self._launched], not self.distributed), self._addresses):
            return False
        found = addresses(self._placed(grads)[: self._launched], known)
        if not equal(found, self._gradient_addresses):
            start = 0
            for batch in self.batches:
                batch.move_gradients(found[start : start + batch.count])
                start += batch.count
            self._gradient_addresses = found
        return not self.copies

    def _fit(self, grads: list[Tensor | None]) -> bool:
        """Whether these gradients are of the kinds that the plan was made for."""
        return all(_fits(g, *wanted) for g, wanted in zip(self._placed(grads), self._wanted, strict=True))


class Placed(Batch):
    """A batch with the places of its parameters in the optimizer, and the numbers of its groups on the device."""

    _written: tuple | None = None

    def __init__(
        self,
        rule: Rule,
        members: list[Member],
        shards: Any,
        places: list[int],
        clips: bool,
        key: Any,
        copies: bool,
    ) -> None:
        """clips: its gradients are of the global norm. key: what shards they are of. copies: see ``add_batches``."""
        super().__init__(rule, members, shards)
        self.places, self.clips, self.key = places, clips, key
        self._copies = [member.gradient for member in members] if copies else []

    def release(self) -> None:
        """Lets go of copies of gradients: the step is over."""
        self._copies = []

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


def _fits(g: Tensor, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> bool:
    return (
        g.shape == shape
        and g.layout == torch.strided
        and g.dtype == dtype
        and backend.is_plain(g)
        and same_strides(shape, g.stride(), stride)
    )
