"""The networks that ``--model`` chooses from: small, with no regularization but what the recipe adds; and others'."""

import math
from collections.abc import Callable

from torch import nn

from fastreg.conversion import convert
from fastreg.training.errors import InputError
from fastreg.training.libraries import is_of_library, model_of_library
from fastreg.training.regularizers import Recipe


def mlp(image_shape: tuple[int, int, int], classes: int, recipe: Recipe, width: int = 800) -> nn.Sequential:
    """Two hidden layers of ``width`` ReLUs: the network that most papers on dropout start from.

    Takes images ``(B, C, H, W)``, where ``(C, H, W)`` is ``image_shape``, gives logits ``(B, classes)``.
    """
    return nn.Sequential(
        *_made(recipe.input_layers),
        nn.Flatten(),
        *_dense(math.prod(image_shape), width, recipe, recipe.dense),
        *_dense(width, width, recipe, recipe.last_hidden or recipe.dense),
        nn.Linear(width, classes),
    )


def cnn(image_shape: tuple[int, int, int], classes: int, recipe: Recipe, channels: int = 16) -> nn.Sequential:
    """Two convolutions of 5 x 5, each followed by pooling, and a dense layer: a small LeNet with ReLUs.

    Takes images ``(B, C, H, W)``, where ``(C, H, W)`` is ``image_shape``, gives logits ``(B, classes)``.

    Raises:
        InputError: H or W is less than 4, so that nothing is left after pooling twice.
    """
    colours, height, width = image_shape
    if min(height, width) < 4:
        raise InputError(f"images of {height} x {width} pixels are too small for the cnn: it needs 4 x 4")
    return nn.Sequential(
        *_made(recipe.input_layers),
        nn.Conv2d(colours, channels, 5, padding=2),
        _activation(channels, 2, recipe),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 5, padding=2),
        _activation(2 * channels, 2, recipe),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *_made(recipe.hidden_layers),
        *_dense(2 * channels * (height // 4) * (width // 4), 256, recipe, recipe.last_hidden or recipe.dense),
        nn.Linear(256, classes),
    )


#: Networks by the name that ``--model`` takes.
MODELS: dict[str, Callable[..., nn.Sequential]] = {"mlp": mlp, "cnn": cnn}

#: Share of the input pixels that dropout drops by default. Dense layers profit from it (Srivastava et al.,
#: 2014, use 0.2), while convolutions lose the neighbourhoods they look for.
INPUT_DROPOUT = {"mlp": 0.2, "cnn": 0.0}


def make_network(name: str, image_shape: tuple[int, int, int], classes: int, recipe: Recipe) -> nn.Module:
    """The network that ``--model`` names, converted where the recipe says so.

    Raises:
        InputError: there is no such model, or it takes no such images.
    """
    if is_of_library(name):
        network = model_of_library(name, image_shape, classes)
    else:
        network = MODELS[name](image_shape, classes, recipe)
    return convert(network) if recipe.converted else network


def _dense(inputs: int, outputs: int, recipe: Recipe, layer: Callable | None = None) -> list[nn.Module]:
    if layer is None:
        layers = [nn.Linear(inputs, outputs), _activation(outputs, 0, recipe)]
    elif recipe.normalization is None:
        layers = [layer(inputs, outputs, "relu")]
    else:
        layers = [layer(inputs, outputs, None), _activation(outputs, 0, recipe)]
    return layers + _made(recipe.hidden_layers)


def _activation(channels: int, spatial: int, recipe: Recipe) -> nn.Module:
    # The layer in front keeps its bias where the normalization takes it away again: without, the same seed
    # would not draw the same weights for every setting.
    return nn.ReLU() if recipe.normalization is None else recipe.normalization(channels, spatial)


def _made(makers: list[Callable[[], nn.Module]]) -> list[nn.Module]:
    return [make() for make in makers]
