"""Dropout layers: torch's classes with the fused forms of ``fastreg.functional.dropout`` as further abilities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from fastreg.nn.layer import Layer
from fastreg.ops import dropout as ops
from fastreg.ops.checks import check_activation


class _Fused(Layer, torch.nn.modules.dropout._DropoutNd):
    """What all dropout layers of fastreg add to torch's: ``activation=``, ``inverted=``, and fused inputs."""

    _function: ClassVar[Callable[..., Tensor]]

    # Defaults for layers whose class was changed: __init__ did not run.
    inplace = False
    activation: str | None = None
    inverted = True

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, activation: str | None = None, inverted: bool = True
    ) -> None:
        super().__init__(p, inplace)
        check_activation(activation)
        self.activation = activation
        self.inverted = inverted

    def forward(self, input: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """D(activation(input + bias)) + residual: see :func:`fastreg.functional.dropout`."""
        return type(self)._function(
            input,
            self.p,
            self.training,
            self.inplace,
            bias=bias,
            activation=self.activation,
            residual=residual,
            **({} if self.inverted else {"inverted": False}),
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation}"
        if not self.inverted:
            text += ", inverted=False"
        return text


class Dropout(_Fused, torch.nn.Dropout):
    """Zeroes elements with probability ``p`` in training. See also :class:`torch.nn.Dropout`.

    Args:
        p: probability of dropping.
        inplace: write into the input.
        activation: applied before the dropout, in the same pass: a name of ``fastreg.functional.ACTIVATIONS``.
        inverted: False scales by 1 - p in evaluation instead of 1 / (1 - p) in training.

    ``forward(input, *, bias=None, residual=None)`` is D(activation(input + bias)) + residual: see
    :func:`fastreg.functional.dropout`.
    """

    _function = staticmethod(ops.dropout)


class Dropout1d(_Fused, torch.nn.Dropout1d):
    """Zeroes channels of ``[N, C, L]`` or ``[C, L]``. See :class:`Dropout` and :class:`torch.nn.Dropout1d`."""

    _function = staticmethod(ops.dropout1d)


class Dropout2d(_Fused, torch.nn.Dropout2d):
    """Zeroes channels of ``[N, C, H, W]``. See :class:`Dropout` and :class:`torch.nn.Dropout2d`."""

    _function = staticmethod(ops.dropout2d)


class Dropout3d(_Fused, torch.nn.Dropout3d):
    """Zeroes channels of ``[N, C, D, H, W]`` or ``[C, D, H, W]``. See :class:`Dropout`."""

    _function = staticmethod(ops.dropout3d)


class _Alpha(_Fused):
    """Alpha dropout has one form only: the inverted one."""

    def __init__(self, p: float = 0.5, inplace: bool = False, *, activation: str | None = None) -> None:
        super().__init__(p, inplace, activation=activation)


class AlphaDropout(_Alpha, torch.nn.AlphaDropout):
    """Dropout that keeps mean and variance for SELU networks. See :class:`Dropout`, :class:`torch.nn.AlphaDropout`."""

    _function = staticmethod(ops.alpha_dropout)


class FeatureAlphaDropout(_Alpha, torch.nn.FeatureAlphaDropout):
    """Alpha dropout of channels. See :class:`Dropout` and :class:`torch.nn.FeatureAlphaDropout`."""

    _function = staticmethod(ops.feature_alpha_dropout)


class DropPath(_Fused):
    """Zeroes whole samples: stochastic depth. torch has no such layer; ``DropPath(p)(branch, residual=x)``.

    Arguments as in :class:`Dropout`.
    """

    _function = staticmethod(ops.drop_path)


# torch's layers whose training flag governs dropout and nothing else. Our random layers say so themselves, with a class
# attribute ``stochastic = True``.
_TORCHS = (torch.nn.modules.dropout._DropoutNd, torch.nn.MultiheadAttention, torch.nn.RNNBase)


@contextmanager
def mc_dropout(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Monte-Carlo dropout: inside, ``model`` is in evaluation mode, but its dropout and noise layers stay random.

        with fastreg.mc_dropout(model):
            samples = torch.stack([model(x) for _ in range(100)])
        mean, variance = samples.mean(0), samples.var(0)

    Takes torch's dropout layers as well as ours, DropConnect and noise layers, and the dropout inside attention and
    recurrent layers; a layer of your own too, if its class has ``stochastic = True``. Every module's mode is as before
    when the block ends. Source: Gal and Ghahramani 2016 (arXiv 1506.02142).
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = isinstance(module, _TORCHS) or getattr(module, "stochastic", False)
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
