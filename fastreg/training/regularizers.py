"""What ``--compare`` compares: each name is a function that changes a recipe.

A new family is a function here. It can change the layers, the optimizer or the training images:

    @regularizer("clipping")
    def clipping(recipe, options):
        "Gradients of at most --clipping together (Pascanu et al., 2013)."
        recipe.optimizer["max_grad_norm"] = options.clipping

and ``--compare none,clipping,dropout+clipping`` works. An option of its own is one more field of
``settings.Settings`` and one more parameter of ``command.train``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import fastreg.nn as fnn
from fastreg import optim
from fastreg.training.errors import InputError
from fastreg.training.libraries import is_of_library


@dataclass
class Recipe:
    """How the network of one setting is built and trained.

    Attributes:
        input_layers: makers of the layers between the images and the network.
        hidden_layers: makers of the layers behind the activation of every hidden dense layer.
        normalization: maker of what stands between a hidden layer and the next in place of a ReLU: one layer
            that normalizes and applies the ReLU. It is given the number of channels and of spatial
            dimensions, 2 behind a convolution and 0 behind a dense layer.
        dense: maker of every hidden dense layer, in place of ``torch.nn.Linear`` and what it is followed by: given
            inputs, outputs, and the name of the activation, or None where a normalization does it.
        last_hidden: the same of the last dense layer before the output, in place of ``dense``.
        converted: put the network onto fastreg's layers with ``fastreg.convert``.
        smallest_share: the fewest examples of a batch that the layers can train on, in every process.
        optimizer_class: of ``fastreg.optim``, with momentum.
        optimizer: its keyword arguments.
        weights: options of its group of weights: matrices and filters, without biases, scales and shifts.
        hidden_weights: the same of all weights but those of the output layer.
        transforms: functions of the training images of a batch, ``(B, 1, H, W)``, applied in order.
    """

    input_layers: list[Callable[[], nn.Module]] = field(default_factory=list)
    hidden_layers: list[Callable[[], nn.Module]] = field(default_factory=list)
    normalization: Callable[[int, int], nn.Module] | None = None
    dense: Callable[[int, int, str | None], nn.Module] | None = None
    last_hidden: Callable[[int, int, str | None], nn.Module] | None = None
    converted: bool = False
    smallest_share: int = 0
    optimizer_class: type[optim.SGD] = optim.SGD
    optimizer: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    hidden_weights: dict = field(default_factory=dict)
    transforms: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    @property
    def changes_layers(self) -> bool:
        """Whether the network is built of other layers."""
        return bool(
            self.input_layers or self.hidden_layers or self.normalization or self.dense or self.last_hidden
        )

    def make_optimizer(self, model: nn.Module) -> optim.SGD:
        """The optimizer of ``model``, whose last layer is its output."""
        *hidden, output = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": hidden, **self.weights, **self.hidden_weights},
            {"params": [output], **self.weights},
            {"params": others},
        ]
        return self.optimizer_class(groups, **self.optimizer)


Regularizer = Callable[[Recipe, Any], None]  # the recipe to change, and the Settings of the run

REGULARIZERS: dict[str, Regularizer] = {}


def regularizer(name: str) -> Callable[[Regularizer], Regularizer]:
    """Decorator: makes a function available to ``--compare`` under ``name``."""

    def register(function: Regularizer) -> Regularizer:
        REGULARIZERS[name] = function
        return function

    return register


def recipe_for(setting: str, options: Any) -> Recipe:
    """The recipe of one setting: a name, or several joined with ``+``, applied from left to right.

    Raises:
        InputError: a name is not registered, or does not go with the others or with the options.
    """
    recipe = Recipe(optimizer={"lr": options.lr, "momentum": options.momentum})
    if is_of_library(options.model):
        recipe.smallest_share = 2  # most of them normalize batches
    names = setting.split("+")
    for name in names:
        if name not in REGULARIZERS:
            raise InputError(
                f"unknown regularizer '{name}': choose from {', '.join(REGULARIZERS)} (or join some with +)"
            )
        if names.count(name) > 1:
            raise InputError(f"cannot join {name} with itself")
        REGULARIZERS[name](recipe, options)
    return recipe


@regularizer("none")
def none(recipe: Recipe, options: Any) -> None:
    """No regularization: the baseline."""


@regularizer("dropout")
def dropout(recipe: Recipe, options: Any) -> None:
    """Dropout on the hidden units and on the input pixels (Srivastava et al., 2014)."""
    if options.input_dropout > 0:
        recipe.input_layers.append(lambda: fnn.Dropout(options.input_dropout))
    recipe.hidden_layers.append(lambda: fnn.Dropout(options.dropout))


@regularizer("dropconnect")
def dropconnect(recipe: Recipe, options: Any) -> None:
    """DropConnect (Wan et al., 2013) of the last hidden layer, as there, with --dropout as its probability."""
    recipe.last_hidden = lambda inputs, outputs, activation: fnn.DropConnectLinear(
        inputs, outputs, p=options.dropout, activation=activation
    )


@regularizer("input-noise")
def input_noise(recipe: Recipe, options: Any) -> None:
    """Gaussian noise on the input (Bishop, 1995), of --input-noise standard deviation; a pixel is between 0 and 1."""
    recipe.input_layers.append(lambda: fnn.GaussianNoise(options.input_noise))


@regularizer("weight-noise")
def weight_noise(recipe: Recipe, options: Any) -> None:
    """Gaussian noise on the weights of the hidden dense layers (Graves, 2011), of --weight-noise standard deviation."""
    recipe.dense = lambda inputs, outputs, activation: fnn.NoisyLinear(
        inputs, outputs, sigma=options.weight_noise, activation=activation
    )


@regularizer("l2")
def l2(recipe: Recipe, options: Any) -> None:
    """L2 penalty of the weights, ``--l2 / 2 |w|^2``, whose gradient goes through the momentum."""
    _decay(recipe, options.l2)


@regularizer("weight-decay")
def weight_decay(recipe: Recipe, options: Any) -> None:
    """Decoupled weight decay (Loshchilov and Hutter, 2019): weights lose ``lr --weight-decay`` of themselves a step.

    Momentum sums the gradient of an L2 penalty up to ``1 / (1 - momentum)`` of it, ten times at 0.9: a tenth of
    ``--weight-decay`` as ``--l2`` pulls as much, only later. With ``--momentum 0`` equal strengths give equal numbers.
    """
    recipe.optimizer_class = optim.SGDW
    _decay(recipe, options.weight_decay)


@regularizer("l1")
def l1(recipe: Recipe, options: Any) -> None:
    """L1 penalty of the weights: they shrink by ``lr --l1`` a step, past the momentum, to exact zeros."""
    recipe.weights["l1"] = options.l1


@regularizer("max-norm")
def max_norm(recipe: Recipe, options: Any) -> None:
    """Incoming weights of every hidden unit of at most --max-norm together (Srivastava et al., 2014)."""
    recipe.hidden_weights |= {"max_norm": options.max_norm, "max_norm_dim": 0}


@regularizer("batchnorm")
def batchnorm(recipe: Recipe, options: Any) -> None:
    """Batch normalization (Ioffe and Szegedy, 2015), in each process over its own share of the batch."""

    def layer(channels: int, spatial: int) -> nn.Module:
        return (fnn.BatchNorm2d if spatial else fnn.BatchNorm1d)(channels, activation="relu")

    _normalize(recipe, layer)
    recipe.smallest_share = 2  # one example is its own mean, and leaves nothing of itself


@regularizer("groupnorm")
def groupnorm(recipe: Recipe, options: Any) -> None:
    """Group normalization (Wu and He, 2018) in 8 groups, or the most that divide both 8 and the channels."""

    def layer(channels: int, spatial: int) -> nn.Module:
        return fnn.GroupNorm(math.gcd(8, channels), channels, activation="relu")

    _normalize(recipe, layer)


@regularizer("layernorm")
def layernorm(recipe: Recipe, options: Any) -> None:
    """Layer normalization (Ba et al., 2016): each example over all its channels and pixels.

    Scale and shift are those of a channel behind a convolution too, so that it is GroupNorm with one group,
    as Wu and He compare it.
    """

    def layer(channels: int, spatial: int) -> nn.Module:
        if spatial:
            return fnn.GroupNorm(1, channels, activation="relu")
        return fnn.LayerNorm(channels, activation="relu")

    _normalize(recipe, layer)


@regularizer("instancenorm")
def instancenorm(recipe: Recipe, options: Any) -> None:
    """Instance normalization (Ulyanov et al., 2016): each channel over its pixels, behind convolutions alone."""
    if options.model == "mlp":
        raise InputError("instancenorm needs channels with pixels, which the mlp has not: choose --model cnn")

    def layer(channels: int, spatial: int) -> nn.Module:
        return fnn.InstanceNorm2d(channels, affine=True, activation="relu") if spatial else nn.ReLU()

    _normalize(recipe, layer)
    recipe.smallest_share = 1  # torch's instance_norm refuses an empty batch


@regularizer("converted")
def converted(recipe: Recipe, options: Any) -> None:
    """The network put onto fastreg's layers: the same errors, to the rounding, and other times."""
    recipe.converted = True


def _normalize(recipe: Recipe, layer: Callable[[int, int], nn.Module]) -> None:
    if recipe.normalization is not None:
        raise InputError("a network has one normalization, and --compare cannot join two with +")
    recipe.normalization = layer


def _decay(recipe: Recipe, strength: float) -> None:
    if "weight_decay" in recipe.weights:
        raise InputError("the weights have one decay, and --compare cannot join l2 and weight-decay with +")
    recipe.weights["weight_decay"] = strength
