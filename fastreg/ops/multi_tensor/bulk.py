"""Questions to many tensors at once: their gradients, their identities, the addresses of their elements.

An optimizer asks in every step whether its tables of addresses still hold. An answer of torch takes 60 to 100 ns in
Python, most of it on the way there and back; with 10,000 parameters that is what a step of small tensors takes. So
the loops are in C (``bulk.c``), compiled once by the compiler that Triton itself needs, and kept in its cache. Where
there is none the same is done in Python.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.backend import PLAIN
from fastreg.ops.kinds import kinds_of

REMEMBERED = 16  # lists of a function: of the models that are averaged at a time


@functools.cache
def _compiled() -> Any:
    """The loops in C; only where kernels run, where Triton's compiler has to be."""
    if not backend.HAS_TRITON or not (backend.INTERPRETED or torch.cuda.is_available()):
        return None
    try:
        from triton.runtime.build import compile_module_from_src

        return compile_module_from_src(Path(__file__).with_suffix(".c").read_text(), "fastreg_bulk")
    except Exception as error:  # a compiler may be missing or broken in any way
        logging.getLogger(__name__).info("the loops over tensors are in Python: %s", error)
        return None


@functools.cache
def _data_ptr() -> int | None:
    """Where torch's function from a tensor to the address of its elements lies. Inductor's code calls it, too."""
    return getattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", None)


def gradients(parameters: list[Tensor]) -> list[Tensor | None]:
    compiled = _compiled()
    if compiled is not None:
        return compiled.attributes(parameters, "grad", torch._C.TensorBase.grad, PLAIN)
    return [p.grad for p in parameters]


def addresses(
    tensors: Sequence[Tensor | None], known: bool = False, dicts: Iterable[dict] = ()
) -> np.ndarray:
    """int64: where the elements of each tensor lie. -1 where there is no tensor: empty ones may lie at 0.

    known: they have been asked before, or others of the same dispatch keys have. C does not survive the error of a
    tensor that lies nowhere, which Python raises.
    dicts: of each the last plain tensor counts as well. (All of them take too long: each lies somewhere else.)
    """
    compiled, dicts = _compiled() if known and _data_ptr() is not None else None, list(dicts)
    if compiled is not None:
        try:
            return np.frombuffer(compiled.addresses(list(tensors), dicts, _data_ptr(), PLAIN), np.int64)
        except TypeError:  # of a subclass, which may have a ``data_ptr`` of its own
            pass
    lasts = [_last_plain(x) for x in dicts]
    return np.array([-1 if x is None else x.data_ptr() for x in chain(tensors, lasts)], np.int64)


def _last_plain(found: dict) -> Tensor | None:
    values = reversed(found.values()) if isinstance(found, dict) else ()
    return next((x for x in values if type(x) in PLAIN), None)


def equal(found: np.ndarray, before: np.ndarray) -> bool:
    """Whether addresses are the same: ``np.array_equal`` takes several times as long for a few hundred."""
    return found.tobytes() == before.tobytes()


def identities(objects: list, dicts: Iterable[dict] = ()) -> bytes:
    """The ``id`` of objects, and of the values of dicts, as bytes.

    Two answers are equal if nothing was replaced in between, as far as it has lived all the time: what takes the place
    of an object that has ended may have its id. See ``Watch``.
    """
    compiled, dicts = _compiled(), list(dicts)
    if compiled is not None:
        return compiled.identities(objects, dicts)
    try:
        values = list(chain.from_iterable(map(dict.values, dicts)))
    except TypeError:  # a state may hold other things beside dicts
        values = list(chain.from_iterable(x.values() for x in dicts if isinstance(x, dict)))
    return np.fromiter(map(id, chain(objects, values)), np.int64).tobytes()


class Watch:
    """Knows objects again, and the values of dicts, without keeping them alive."""

    def __init__(self, objects: list, dicts: Iterable[dict] = ()):
        self._identities = identities(objects, dicts)
        self._ended: list[weakref.ref] = []
        found = chain(objects, *(x.values() for x in dicts if isinstance(x, dict)))
        # Numbers need no reference: whatever depends on them is read anew in every step.
        tensors = (x for x in found if isinstance(x, Tensor))
        self._references = list(map(weakref.ref, tensors, repeat(self._ended.append)))

    @property
    def lives(self) -> bool:
        """Whether all are still alive: the id of an object that has ended may be another's."""
        return not self._ended

    def finds(self, objects: list, dicts: Iterable[dict] = ()) -> bool:
        """Whether these are the same."""
        return self.lives and identities(objects, dicts) == self._identities


def remembered(build: Callable) -> Callable:
    """Of ``build(*lists, **options)`` of tensors: keeps the latest results while the same tensors lie where they lay.

    A result follows from options and from the tensors' kinds, shapes and addresses, and holds no tensor. The tensors of
    the last list are the user's, who may give them another shape at the same address, by ``x.data = x.data[:2]``.
    """
    kept: dict[tuple, tuple[Watch, Any, np.ndarray, Any]] = {}

    @functools.wraps(build)
    def found(*lists: Sequence[Tensor], **options: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return build(*lists, **options)
        tensors = list(chain(*lists))
        key = *map(len, lists), *options.items(), identities(tensors)
        known = kept.pop(key, None)
        if known is not None:
            watch, kinds, before, result = known
            alike = watch.lives and kinds.check(*lists[-1])
            if alike and equal(addresses(tensors, known=True), before):
                kept[key] = known  # the latest comes last
                return result
        result = build(*lists, **options)
        if all(type(x) in PLAIN and x.layout == torch.strided for x in tensors):
            while len(kept) >= REMEMBERED:
                kept.pop(next(iter(kept)), None)
            kept[key] = Watch(tensors), kinds_of(lists[-1]), addresses(tensors), result
        return result

    return found


def by_kind(sort: Callable) -> Callable:
    """Of ``sort(*lists, **options)``, which is ``remembered``: keeps results that launch nothing for all tensors of
    the same kinds.

    Without launches there are no addresses. A result says by ``launched`` whether there are.
    """
    kept: dict[tuple, tuple[Any, Any]] = {}

    @functools.wraps(sort)
    def found(*lists: Sequence[Tensor], **options: Any) -> Any:
        if not lists[0] or backend.runs_kernels(lists[0][0]) or backend.watched():
            return sort(*lists, **options)
        tensors = list(chain(*lists))
        key = *map(len, lists), *options.items(), tensors[0].shape
        known = kept.pop(key, None)
        if known is None or not known[0].check(*tensors):
            result = sort(*lists, **options)
            if result.launched or not all(type(x) in PLAIN and x.layout == torch.strided for x in tensors):
                return result
            while len(kept) >= REMEMBERED:
                kept.pop(next(iter(kept)), None)
            known = kinds_of(tensors), result
        kept[key] = known
        return known[1]

    return found
