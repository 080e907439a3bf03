"""Seams at run time: the fused form where the layers allow it, and else what the library itself would compute.

The layers of a block may have changed since its conversion: hooks, adapters, another class. So each function looks at
what it is given, and a layer that is not ours, or that has hooks, is called as ever.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as hooks

from fastreg import functional as F
from fastreg.blocks.activations import Absorbed
from fastreg.folding import ChannelAffine, Folded
from fastreg.nn import DropPath, LayerNorm
from fastreg.nn.fused import FusedNorm


def hooked(*modules: nn.Module | None) -> bool:
    """Whether one of them has hooks, which see what goes in and comes out."""
    for module in modules:
        if module is not None and (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return hooks._has_any_global_hook()


def idle(drop: nn.Module | None) -> bool:
    """Whether it is the identity now: there is none, it drops nothing, or it is in evaluation mode."""
    if drop is None or type(drop) is nn.Identity:
        return True
    if isinstance(drop, (nn.Dropout, DropPath)):
        return not drop.training or drop.p == 0.0
    return False


def _adds(norm: nn.Module) -> TypeGuard[FusedNorm]:
    """Whether it takes a residual: our norms, and what is left of one that was folded."""
    return isinstance(norm, (FusedNorm, ChannelAffine, Folded))


def _takes_sum(norm: nn.Module, branch: Tensor) -> TypeGuard[LayerNorm]:
    """Whether a function may compute what ``norm`` does: it normalizes the last dimensions and nothing more, and
    nobody traces the calls of layers (torch.fx)."""
    plain = isinstance(norm, LayerNorm) and type(norm).forward is LayerNorm.forward
    return plain and not isinstance(branch, Proxy) and not hooked(norm)


def add(drop: nn.Module | None, branch: Tensor, skip: Tensor) -> Tensor:
    """skip + drop(branch)."""
    if drop is None or hooked(drop):
        return (branch if drop is None else drop(branch)) + skip
    if idle(drop):
        return branch + skip
    if isinstance(drop, (DropPath, nn.Dropout)) and hasattr(drop, "inverted"):
        return drop(branch, residual=skip)
    return drop(branch) + skip


def norm_add_act(norm: nn.Module, act: nn.Module, branch: Tensor, skip: Tensor) -> Tensor:
    """act(norm(branch) + skip), in the dtype of ``branch``."""
    if _adds(norm) and (isinstance(act, Absorbed) if norm.activation else not hooked(norm)):
        y = norm(branch, residual=skip)
        return act(y if isinstance(y, Proxy) else y.to(branch.dtype))
    y = norm(branch)
    y += skip
    return act(y)


def norm_drop_add(norm: nn.Module, drop: nn.Module | None, branch: Tensor, skip: Tensor) -> Tensor:
    """skip + drop(norm(branch)): one pass where nothing is dropped, else the addition in the pass of ``drop``."""
    if idle(drop) and _adds(norm) and norm.activation is None and not hooked(drop, norm):
        return norm(branch, residual=skip)
    return add(drop, norm(branch), skip)


def add_norm(drop: nn.Module | None, branch: Tensor, skip: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """h = skip + drop(branch), and norm(h), which is what the next branch takes: one pass for both."""
    if _takes_sum(norm, branch) and not hooked(drop):
        if isinstance(drop, nn.Dropout):
            return dropout_add_norm(branch, skip, norm, drop.p, drop.training)
        if idle(drop):
            return dropout_add_norm(branch, skip, norm, 0.0, False)
    h = add(drop, branch, skip)
    return h, norm(h)


def dropout_add(branch: Tensor, skip: Tensor, p: float, training: bool) -> Tensor:
    """skip + dropout(branch), for dropout without a module."""
    if isinstance(branch, Proxy):
        return F.dropout(branch, p, training) + skip
    return F.dropout(branch, p, training, residual=skip)


def dropout_add_norm(
    branch: Tensor, skip: Tensor, norm: nn.Module, p: float, training: bool
) -> tuple[Tensor, Tensor]:
    """As ``add_norm``, for dropout without a module."""
    if not _takes_sum(norm, branch):
        h = dropout_add(branch, skip, p, training)
        return h, norm(h)
    normalized, h = F.dropout_add_layer_norm(
        branch,
        skip,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        p,
        training,
        prenorm=True,
        activation=norm.activation,
    )
    return h, normalized


def dropout_add_postnorm(drop: nn.Module, branch: Tensor, skip: Tensor, norm: nn.Module) -> Tensor:
    """norm(skip + drop(branch)), whose result is the next stream.

    Under autocast torch's stream is fp32, and the fused form would round it to 16 bits: then dropout and addition are
    one pass, and the normalization another.
    """
    if not (isinstance(drop, nn.Dropout) and _takes_sum(norm, branch)) or hooked(drop):
        return norm(add(drop, branch, skip))
    if branch.dtype != skip.dtype or torch.is_autocast_enabled(branch.device.type):
        return norm(add(drop, branch, skip))
    normalized = F.dropout_add_layer_norm(
        branch,
        skip,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        drop.p,
        drop.training,
        activation=norm.activation,
    )
    assert isinstance(normalized, Tensor)  # no pair
    return normalized


def _until_last(layers: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """What a sequence of layers makes of ``x`` without its last layer, and that layer; None: it was called too."""
    if not is_sequence(layers) or hooked(layers):
        return layers(x), None
    *first, last = layers.children()
    for layer in first:
        x = layer(x)
    return _until_last(last, x) if is_sequence(last) else (x, last)


def is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and len(module) > 0
    )


def last_layer(layers: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The last layer of a sequence, also of one inside it, and its name."""
    while is_sequence(layers):
        last, layers = list(layers.named_children())[-1]
        name = f"{name}.{last}"
    return name, layers


def sequence_add(layers: nn.Module, drop: nn.Module | None, x: Tensor, skip: Tensor) -> Tensor:
    """skip + drop(layers(x)), where the last layer may take the addition into its pass."""
    branch, last = _until_last(layers, x)
    if last is None:
        return add(drop, branch, skip)
    if _adds(last):
        return norm_drop_add(last, drop, branch, skip)
    if isinstance(last, nn.Dropout) and idle(drop) and not hooked(drop):
        return add(last, branch, skip)
    return add(drop, last(branch), skip)
