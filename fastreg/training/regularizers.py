"""What ``--compare`` compares: each name is a function that changes a recipe.

A new family is a function here. It can change the layers, the optimizer or the training images:

    @regularizer("weight-decay")
    def weight_decay(recipe, options):
        "Decoupled weight decay (--weight-decay)."
        recipe.optimizer["weight_decay"] = options.weight_decay

and ``--compare none,weight-decay,dropout+weight-decay`` works. An option of its own is one more field of
``settings.Settings`` and one more parameter of ``command.train``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import fastreg.nn as fnn
from fastreg.training.errors import InputError


@dataclass
class Recipe:
    """How the network of one setting is built and trained.

    Attributes:
        input_layers: makers of the layers between the images and the network.
        hidden_layers: makers of the layers behind the activation of every hidden dense layer.
        optimizer: keyword arguments of ``torch.optim.SGD``.
        transforms: functions of the training images of a batch, ``(B, 1, H, W)``, applied in order.
    """

    input_layers: list[Callable[[], nn.Module]] = field(default_factory=list)
    hidden_layers: list[Callable[[], nn.Module]] = field(default_factory=list)
    optimizer: dict = field(default_factory=dict)
    transforms: list[Callable[[Tensor], Tensor]] = field(default_factory=list)


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
        InputError: a name is not registered.
    """
    recipe = Recipe(optimizer={"lr": options.lr, "momentum": options.momentum})
    for name in setting.split("+"):
        if name not in REGULARIZERS:
            raise InputError(
                f"unknown regularizer '{name}': choose from {', '.join(REGULARIZERS)} (or join some with +)"
            )
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
