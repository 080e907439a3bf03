"""A swap: which class becomes which, and the seams that this can fuse.

Conversion assigns ``module.__class__``. What a module was is kept beside its parameters, in ``vars(module)``: deep
copies and pickles take it along, and ``revert`` reads it.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.nn import Module


class Seam(NamedTuple):
    """A place between two layers where a tensor would be written and read once more.

    kind: what meets there, as "norm -> activation".
    parts: names of the children, relative to the module that has the seam.
    why_not: the reason why it stays as it is, or None.
    absorbs: two of ``parts``: the layer that takes up an activation, and the activation. None: a ``forward`` fuses it.
    """

    kind: str
    parts: tuple[str, ...]
    why_not: str | None = None
    absorbs: tuple[str, str] | None = None


def no_obstacle(module: Module) -> str | None:
    return None


def no_seams(module: Module) -> list[Seam]:
    return []


class Swap(NamedTuple):
    """``theirs`` becomes ``ours``, a subclass of it; None: its class stays, and only its children change.

    written_for: method -> hashes of its source that this swap was written for; see ``source_hash``.
    obstacle: why a module of this class has to stay as it is, or None.
    seams: where a module of this class can be fused.
    block: it has nothing but seams, so that without fusion it stays as it is.
    """

    theirs: type[Module]
    ours: type[Module] | None
    written_for: Mapping[str, tuple[str, ...]] = {}
    obstacle: Callable[[Any], str | None] = no_obstacle
    seams: Callable[[Any], list[Seam]] = no_seams
    block: bool = False

    def foreign(self) -> str | None:
        """The method whose source is another than the one that this was written for, or None."""
        for method, hashes in self.written_for.items():
            if source_hash(getattr(self.theirs, method)) not in hashes:
                return method
        return None


def pairs(*found: tuple[str, str]) -> list[Seam]:
    """Seams between a norm and the activation behind it."""
    return [Seam("norm -> activation", pair, absorbs=pair) for pair in found]


def source_hash(function: Callable[..., Any]) -> str:
    """Twelve digits that name the source of ``function``, whatever its indentation and line ends."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return "no source"
    return hashlib.sha256(" ".join(source.split()).encode()).hexdigest()[:12]


class Origin(NamedTuple):
    """What a converted module was: its class, and its former attributes of the names that conversion set.

    A former attribute is a tuple of it alone, and an empty one where the module had none.
    """

    type: type[Module]
    attributes: dict[str, tuple[Any, ...]]


_ORIGIN = "_fastreg_origin"


def origin(module: Module) -> Origin | None:
    """What ``module`` was before its conversion; None: it was not converted."""
    return vars(module).get(_ORIGIN)


def original_type(module: Module) -> type[Module]:
    found = origin(module)
    return type(module) if found is None else found.type


def swap(module: Module, ours: type[Module] | None = None, **attributes: Any) -> None:
    """Gives ``module`` this class and these attributes, until ``swap_back``."""
    state = vars(module)
    former = state.setdefault(_ORIGIN, Origin(type(module), {})).attributes
    for name, value in attributes.items():
        former.setdefault(name, (state[name],) if name in state else ())
        state[name] = value
    if ours is not None:
        module.__class__ = ours


def swap_back(module: Module) -> None:
    state = vars(module)
    found = state.pop(_ORIGIN, None)
    if found is None:
        return
    module.__class__ = found.type
    for name, value in found.attributes.items():
        del state[name]
        if value:
            (state[name],) = value
