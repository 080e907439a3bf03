"""``explain``: what a conversion does to a model, as a table and as plain data."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastreg.conversion.plan import Filter, Fusion, Layer, plan

if TYPE_CHECKING:
    from rich.console import Group


class _Saved(NamedTuple):
    accesses: float  # of a tensor of the seam's size, forward and backward
    masks: int = 0  # accesses of dropout's mask, a byte an element


# What ATen's passes read and write, less what the fused ones do. An activation: 2 forward (it reads and writes), 3
# backward (dy, y, dx). An addition: 3, and none backward. Dropout: 2 + mask, 2 + mask. A norm: 2, 3. Where a sum goes
# on beside the norm, the sum of its two gradients: 3 more.
SAVED = {
    "norm -> activation": _Saved(2 + 3),
    "norm -> add -> activation": _Saved(
        3 + 5 - 2
    ),  # the fused passes read the residual, and write its gradient
    "norm -> add": _Saved(3 - 1),
    "activation -> dropout": _Saved(5 + 4 - 5, 2),
    "dropout -> add": _Saved(4 + 3 - 5, 2),
    "drop path -> add": _Saved(4 + 3 - 5),
    "dropout -> add -> norm": _Saved(4 + 3 + 5 - 8, 2),
    "dropout -> add -> norm, sum reused": _Saved(4 + 3 + 5 + 3 - 9, 2),
    "add -> norm, sum reused": _Saved(3 + 5 + 3 - 8),
}


class Explanation:
    """What :func:`fastreg.convert` does to a model, or has done.

    Attributes:
        layers: a dict for each layer that is known or looks like one that could be: ``name``, ``type``, ``becomes``
            (None: it stays) and ``why_not``.
        seams: a dict for each place where layers could be fused: ``name`` of the module that has it, ``kind``,
            ``parts``, ``fused``, ``why_not``, and ``bytes`` that fusion saves a training step (None without an
            example).
        unusable: libraries whose version fastreg does not know, and why.

    ``print`` shows it as tables.
    """

    def __init__(self, layers: list[dict], seams: list[dict], unusable: dict[str, str]) -> None:
        self.layers = layers
        self.seams = seams
        self.unusable = unusable

    def as_dict(self) -> dict[str, Any]:
        """All of it in lists and dicts of strings and numbers, for JSON."""
        return {"layers": self.layers, "seams": self.seams, "unusable": self.unusable}

    @property
    def bytes_saved(self) -> int | None:
        """By all fused seams, in a training step of the example; None without one."""
        known = [seam["bytes"] for seam in self.seams if seam["fused"] and seam["bytes"] is not None]
        return sum(known) if known else None

    def summary(self) -> str:
        converted = sum(layer["becomes"] is not None for layer in self.layers)
        fused = sum(seam["fused"] for seam in self.seams)
        text = f"{converted} of {len(self.layers)} layers are converted, {fused} of {len(self.seams)} seams fused"
        saved = self.bytes_saved
        return text if saved is None else f"{text}: {saved / 1e6:.1f} MB less a training step"

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return self._text()
        console = Console(width=120)
        with console.capture() as found:
            console.print(self)
        return found.get().rstrip()

    def _text(self) -> str:
        lines = [f"{x['name']}: {x['type']} -> {x['becomes'] or x['why_not']}" for x in self.layers]
        lines += [f"{x['name']}: {x['kind']}: {'fused' if x['fused'] else x['why_not']}" for x in self.seams]
        lines += [f"{library}: {reason}" for library, reason in self.unusable.items()]
        return "\n".join([*lines, self.summary()])

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.table import Table

        layers = Table("layer", "is", "becomes", title="Layers", title_justify="left")
        for x in self.layers:
            layers.add_row(x["name"] or "(the model)", x["type"], x["becomes"] or f"stays: {x['why_not']}")
        kinds = Table("seam", "found", "fused", "left, and why", title="Seams", title_justify="left")
        for kind, count in Counter(x["kind"] for x in self.seams).items():
            here = [x for x in self.seams if x["kind"] == kind]
            reasons = Counter(x["why_not"] for x in here if not x["fused"])
            why_not = "\n".join(f"{times}: {reason}" for reason, times in reasons.items())
            kinds.add_row(kind, str(count), str(count - reasons.total()), why_not)
        unusable = [f"{library}: {reason}" for library, reason in self.unusable.items()]
        return Group(layers, kinds, *unusable, self.summary())


def explain(
    model: nn.Module, example: Any = None, *, fuse: bool | str = True, filter: Filter | None = None
) -> Explanation:
    """What :func:`fastreg.convert` would do to ``model``, or has done, and what it leaves and why.

        print(fastreg.explain(model))

    Nothing is changed.

    Args:
        model: converted or not.
        example: an input of the model, a tuple of its arguments, or a mapping of them: the model is called once with
            it, in evaluation mode and without gradients, to learn sizes. Then the bytes that fusion saves in a
            training step are counted: what ATen's separate passes read and write, less what the fused passes do.
        fuse, filter: as for :func:`fastreg.convert`.

    Raises: as :func:`fastreg.convert`.
    """
    found = plan(model, fuse, filter)
    sizes = {} if example is None else _sizes(model, found.fusions, example)
    layers = [_layer(layer) for layer in found.layers]
    seams = [_seam(fusion, sizes) for fusion in found.fusions]
    return Explanation(layers, seams, found.unusable)


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "type": _title(layer.kind),
        "becomes": None if layer.becomes is None else _title(layer.becomes),
        "why_not": layer.why_not,
    }


def _title(kind: type[nn.Module]) -> str:
    package, _, rest = kind.__module__.partition(".")
    if package == "fastreg":
        package = "fastreg.nn" if rest.startswith("nn.") else f"fastreg.{rest}"
    elif kind.__module__.startswith("torch.nn"):
        package = "nn"
    return f"{package}.{kind.__name__}"


def _seam(fusion: Fusion, sizes: Mapping[nn.Module, Tensor]) -> dict[str, Any]:
    seam = fusion.seam
    fused = seam.why_not is None
    saved = None
    y = sizes.get(_measured(fusion)) if seam.parts else None
    if fused and y is not None and seam.kind in SAVED:
        accesses, masks = SAVED[seam.kind]
        saved = int(y.numel() * (accesses * y.element_size() + masks))
    return {
        "name": fusion.name,
        "kind": seam.kind,
        "parts": list(seam.parts),
        "fused": fused,
        "why_not": seam.why_not,
        "bytes": saved,
    }


def _measured(fusion: Fusion) -> nn.Module:
    """The layer whose output has the size of the seam."""
    return fusion.owner.get_submodule(fusion.seam.parts[0])


def _sizes(model: nn.Module, fusions: list[Fusion], example: Any) -> dict[nn.Module, Tensor]:
    """Tensors without data, of the size of what the layers at the seams give."""
    sizes: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes[module] = output.to("meta")

    layers = {_measured(fusion) for fusion in fusions if fusion.seam.parts}
    with _evaluated(model), contextlib.ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(layer.register_forward_hook(note).remove)
        if isinstance(example, Mapping):
            model(**example)
        else:
            model(*example) if isinstance(example, tuple) else model(example)
    return sizes


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
