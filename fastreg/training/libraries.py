"""Models of timm and torchvision, as ``--model`` names them."""

from importlib import import_module

from torch import Tensor, nn

from fastreg.training.errors import InputError

LIBRARIES = ("timm", "torchvision")


def is_of_library(name: str) -> bool:
    """Whether it names a model of a library, as timm/resnet18 does."""
    library, _, model = name.partition("/")
    return library in LIBRARIES and bool(model)


def model_of_library(name: str, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """With random weights."""
    library, _, model = name.partition("/")
    try:
        found = import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError:
        raise InputError(f"--model {name} needs {library}: pip install {library}") from None
    if model not in found.list_models():
        raise InputError(f"{library} has no model '{model}'")
    if library == "timm":
        return found.create_model(model, num_classes=classes, in_chans=image_shape[0])
    network = found.get_model(model, weights=None, num_classes=classes)
    return network if image_shape[0] == 3 else nn.Sequential(ThreeColours(), network)


class ThreeColours(nn.Module):
    """Grey images ``(B, 1, H, W)`` as ``(B, 3, H, W)``."""

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1)
