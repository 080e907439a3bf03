"""``convert`` and ``revert``: the classes of a model's layers, changed and changed back."""

from typing import Any, TypeVar

from torch import nn

from fastreg.blocks.activations import Absorbed, activation_name
from fastreg.blocks.swap import swap, swap_back
from fastreg.conversion.obstacles import obstacle_of_all
from fastreg.conversion.plan import Filter, Fusion, plan

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, *, fuse: bool | str = True, filter: Filter | None = None) -> Model:
    """Puts the layers of ``model`` onto fastreg's, in place, and fuses them with what stands around them.

        model = fastreg.convert(timm.create_model("resnet50"))

    Only classes change (``module.__class__``): parameters, buffers, hooks, names, modes, ``state_dict`` and every
    reference to a module or a parameter stay. Layers of torch, torchvision, timm and transformers are known, by their
    exact classes; :func:`fastreg.explain` lists what becomes of each layer, and what stays and why.
    :func:`fastreg.revert` takes it back. A second call changes nothing.

    Results are those of the model before: to the bit on a CPU where only classes change, and to the rounding of the
    dtype where layers are fused. Random masks follow the same law; on a GPU they are other draws.

    A layer that applies the activation behind it has the activation's output as its own. So convert first, then
    register forward hooks on norms; layers that have hooks already are not fused.

    Args:
        model: not compiled, sharded by FSDP, or scripted yet. Parts of it that are stay as they are.
        fuse: fuse activations, additions and dropout with the layers before or behind them, in ``nn.Sequential`` and
            in the blocks of the libraries. False: change classes of layers alone. "trace": also norms with an
            activation module behind them, and activations with a dropout behind them, wherever ``torch.fx`` can trace
            the code between them.
        filter: ``filter(module, name)`` is False for a module that has to stay as it is.

    Returns: ``model``.

    Raises:
        TypeError: no module.
        ValueError: another word for fuse.
        RuntimeError: the model is compiled, sharded or scripted. Nothing was changed.
    """
    found = plan(model, fuse, filter)
    fusions = [fusion for fusion in found.fusions if fusion.absorbs_now]
    places = _places(fusions)
    former: list[tuple[nn.Module, type[nn.Module], dict]] = []

    def change(module: nn.Module, ours: type[nn.Module] | None = None, **attributes: Any) -> None:
        former.append((module, type(module), dict(vars(module))))
        swap(module, ours, **attributes)

    try:
        for layer in found.layers:
            if layer.changes:
                change(layer.module, layer.becomes)
        for fusion in fusions:
            change(fusion.into, activation=fusion.activation)
        for absorbed, owners in places.items():
            change(absorbed, Absorbed, activation=activation_name(absorbed), absorbed_by=owners)
    except BaseException:
        for module, kind, state in reversed(former):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
        raise
    return model


def _places(fusions: list[Fusion]) -> dict[nn.Module, tuple[tuple[nn.Module, str], ...]]:
    """Activations that give way, and the children of parents that apply them.

    A layer with the activation as its child, as timm's BatchNormAct2d, keeps it, and passes it by.
    """
    found: dict[nn.Module, tuple[tuple[nn.Module, str], ...]] = {}
    for fusion in fusions:
        if fusion.seam.absorbs is not None and fusion.into is not fusion.owner:
            parent, _, child = fusion.seam.absorbs[0].rpartition(".")
            place = (fusion.owner.get_submodule(parent), child)
            found[fusion.absorbed] = (*found.get(fusion.absorbed, ()), place)
    return found


def revert(model: Model) -> Model:
    """Takes back what :func:`convert` did, in place: classes, and fused activations.

    Layers of fastreg that were not converted stay. Parameters, buffers, hooks and modes are as they are now.

    Args:
        model: as for :func:`convert`.

    Returns: ``model``.

    Raises:
        TypeError: no module.
        RuntimeError: the model is compiled, sharded or scripted. Nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, but got a {type(model).__name__}")
    reason = obstacle_of_all(model)
    if reason is not None:
        raise RuntimeError(f"the model cannot be reverted, for it is {reason}")
    for module in model.modules():
        swap_back(module)
    return model
