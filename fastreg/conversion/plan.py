"""What a conversion does, worked out before anything is changed."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from fastreg.blocks import known
from fastreg.blocks.activations import activation_name, is_activation
from fastreg.blocks.seams import hooked, is_sequence
from fastreg.blocks.swap import Seam, Swap, origin, original_type
from fastreg.conversion.obstacles import obstacle, obstacle_of_all
from fastreg.conversion.trace import NORMS, traced_seams
from fastreg.nn.fused import FusedNorm

Filter = Callable[[nn.Module, str], bool]

Swaps = dict[type[nn.Module], Swap]


class Layer(NamedTuple):
    """A module, and what becomes of it."""

    name: str
    module: nn.Module
    kind: type[nn.Module]  # what it is, or was before its conversion
    becomes: type[nn.Module] | None  # None: it stays
    why_not: str | None = None

    @property
    def changes(self) -> bool:
        return self.becomes is not None and type(self.module) is not self.becomes


class Fusion(NamedTuple):
    """A seam in the model, and the activation that is absorbed there, if any."""

    name: str  # of the module that has the seam
    owner: nn.Module
    seam: Seam
    activation: str | None = None

    @property
    def into(self) -> nn.Module:
        """The layer that takes up the activation."""
        assert self.seam.absorbs is not None
        return self.owner.get_submodule(self.seam.absorbs[0])

    @property
    def absorbed(self) -> nn.Module:
        assert self.seam.absorbs is not None
        return self.owner.get_submodule(self.seam.absorbs[1])

    @property
    def is_done(self) -> bool:
        found = origin(self.into)
        return found is not None and "activation" in found.attributes

    @property
    def absorbs_now(self) -> bool:
        return self.seam.absorbs is not None and self.seam.why_not is None and not self.is_done


class Plan(NamedTuple):
    layers: list[Layer]
    fusions: list[Fusion]
    unusable: dict[str, str]  # libraries, and why their blocks are not known


def plan(model: nn.Module, fuse: bool | str = True, filter: Filter | None = None) -> Plan:
    """Raises: TypeError, RuntimeError: ``model`` itself cannot be converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, but got a {type(model).__name__}")
    if not (isinstance(fuse, bool) or fuse == "trace"):
        raise ValueError(f'fuse has to be True, False or "trace", but got {fuse!r}')
    reason = obstacle_of_all(model)
    if reason is not None:
        raise RuntimeError(f"the model cannot be converted, for it is {reason}")
    swaps, unusable = known()
    layers, searched = [], []
    for name, module, closed in _walk(model):
        swap = swaps.get(original_type(module))
        if closed is not None:
            layers.append(Layer(name, module, original_type(module), None, closed))
            continue
        layer = _layer(name, module, swap, fuse, filter)
        if layer is not None:
            layers.append(layer)
        if fuse:
            searched.append((name, module, swap, layer))
    fusions = [
        Fusion(name, module, seam)
        for name, module, swap, layer in searched
        for seam in _seams(module, swap, layer, swaps)
    ]
    if fuse == "trace":
        fusions += _traced(model, fusions)
    return Plan(layers, _checked(model, fusions, {layer.module: layer for layer in layers}), unusable)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Every module once, with its first name, and why nothing inside it may change; nothing inside follows then."""
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
        if module in seen:
            return
        seen.add(module)
        closed = obstacle_of_all(module)
        yield name, module, closed
        if closed is None:
            for child_name, child in module.named_children():
                yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", model)


def _layer(
    name: str, module: nn.Module, swap: Swap | None, fuse: bool | str, filter: Filter | None
) -> Layer | None:
    """None: nothing is to be said about it."""
    kind = original_type(module)
    if swap is None:
        if (
            origin(module) is None
            and isinstance(module, (*NORMS, nn.modules.dropout._DropoutNd))
            and not _is_ours(kind)
        ):
            return Layer(name, module, kind, None, _unknown(module, kind))
        return None
    if swap.block and not fuse and origin(module) is None:
        return None
    method = swap.foreign()
    reason = obstacle(module)
    if reason is None and method is not None:
        reason = f"{kind.__name__}.{method} is not the version that fastreg knows"
    if reason is None:
        reason = swap.obstacle(module)
    if reason is None and filter is not None and not filter(module, name):
        reason = "left by the filter"
    if swap.ours is None and reason is None:
        return None
    return Layer(name, module, kind, None if reason else swap.ours, reason)


def _is_ours(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("fastreg.")


def _unknown(module: nn.Module, kind: type[nn.Module]) -> str:
    reason = obstacle(module)
    if reason is not None:
        return reason
    base = next(base for base in kind.__mro__[1:] if base.__module__.startswith("torch.nn"))
    return f"a subclass of torch.nn.{base.__name__} that fastreg does not know"


# --- seams ------------------------------------------------------------------------------------------------


def _seams(module: nn.Module, swap: Swap | None, layer: Layer | None, swaps: Swaps) -> list[Seam]:
    if swap is not None:
        if layer is not None and layer.why_not is not None:
            seam = Seam("block", (), layer.why_not)
            return [seam] if swap.block else []
        return swap.seams(module)
    return _in_sequence(module, swaps) if is_sequence(module) else []


def _in_sequence(module: nn.Module, swaps: Swaps) -> list[Seam]:
    """Norms with an activation behind them, and activations with a dropout behind them."""
    found = []
    children = list(module.named_children())
    taken: set[str] = set()
    for (name, first), (next_name, second) in pairwise(children):
        if _is_norm(first, swaps) and is_activation(second):
            found.append(Seam("norm -> activation", (name, next_name), absorbs=(name, next_name)))
            taken.add(next_name)
        elif is_activation(first) and name not in taken and isinstance(second, nn.Dropout) and second.p > 0:
            found.append(Seam("activation -> dropout", (name, next_name), absorbs=(next_name, name)))
    return found


def _traced(model: nn.Module, known: list[Fusion]) -> list[Fusion]:
    """Seams that torch.fx finds and that are not known yet."""
    taken = {layer for fusion in known if fusion.seam.absorbs for layer in (fusion.into, fusion.absorbed)}
    found = [Fusion(name, module, seam) for name, module, seam in traced_seams(model)]
    return [fusion for fusion in found if not {fusion.into, fusion.absorbed} & taken]


def _is_norm(module: nn.Module, swaps: Swaps) -> bool:
    swap = swaps.get(original_type(module))
    ours = type(module) if swap is None or swap.ours is None else swap.ours
    return issubclass(ours, (FusedNorm, *NORMS))


def _checked(model: nn.Module, fusions: list[Fusion], layers: dict[nn.Module, Layer]) -> list[Fusion]:
    """``fusions`` with the name of the activation that is absorbed, or the reason why it is not."""
    places = Counter(child for parent in set(model.modules()) for child in parent._modules.values())

    def check(fusion: Fusion) -> Fusion:
        if fusion.seam.absorbs is None or fusion.seam.why_not is not None:
            return fusion
        name = activation_name(fusion.absorbed)
        if name is None:
            reason: str | None = f"{original_type(fusion.absorbed).__name__} is no activation of the kernels"
        elif fusion.is_done:
            reason = None
        else:
            reason = _why_not(fusion.into, fusion.absorbed, layers, places)
        return fusion._replace(seam=fusion.seam._replace(why_not=reason), activation=name)

    return _all_or_none([check(fusion) for fusion in fusions])


def _all_or_none(fusions: list[Fusion]) -> list[Fusion]:
    """An activation that several layers share is absorbed by all of them, or by none."""
    refused = {
        fusion.absorbed: fusion.seam.why_not
        for fusion in fusions
        if fusion.seam.absorbs is not None and fusion.seam.why_not is not None
    }

    def check(fusion: Fusion) -> Fusion:
        if fusion.seam.absorbs is None or fusion.seam.why_not or fusion.absorbed not in refused:
            return fusion
        reason = f"another layer shares the activation: {refused[fusion.absorbed]}"
        return fusion._replace(seam=fusion.seam._replace(why_not=reason))

    return list(map(check, fusions))


def _why_not(
    into: nn.Module, absorbed: nn.Module, layers: dict[nn.Module, Layer], places: Counter[nn.Module | None]
) -> str | None:
    layer = layers.get(into)
    if layer is not None and layer.why_not is not None:
        return f"{layer.kind.__name__}: {layer.why_not}"
    becomes = type(into) if layer is None or layer.becomes is None else layer.becomes
    if not hasattr(becomes, "activation"):
        return f"{becomes.__name__} has no fused activation"
    if getattr(into, "activation", None) is not None:
        return "the layer has an activation already"
    if getattr(into, "inplace", False):
        return "the dropout is in place"
    if hooked(into, absorbed):
        return "hooks would see other values"
    if "forward" in vars(absorbed):
        return "the activation's forward was replaced"
    if places[into] > 1 or places[absorbed] > 1:
        return "it has several places in the model"
    return None
