"""Every layer of ``fastreg.nn`` in each of its kinds, for what all of them have to do alike."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fastreg.nn as fnn


class Case(NamedTuple):
    layer: str  # its name
    arguments: tuple[Any, ...]  # torch's layer of that name takes them too
    keywords: dict[str, Any]  # ours alone
    shape: tuple[int, ...]  # of an input

    def make(self, **keywords) -> torch.nn.Module:
        return getattr(fnn, self.layer)(*self.arguments, **self.keywords, **keywords)

    @property
    def torchs(self) -> Callable[..., torch.nn.Module] | None:
        """Makes torch's layer of the same parameters, which in evaluation computes the same; None if there is none."""
        parents = (c for c in getattr(fnn, self.layer).__mro__ if c.__module__.startswith("torch.nn.modules"))
        parent = next(parents)
        if parent.__name__.startswith(("Module", "_")):
            return None
        return lambda **keywords: parent(*self.arguments, **keywords)


def _linear(layer: str, **keywords) -> Case:
    return Case(layer, (6, 4), keywords, (5, 6))


LAYERS = {
    "Dropout": Case("Dropout", (), {}, (4, 6)),
    "Dropout1d": Case("Dropout1d", (), {}, (4, 6, 5)),
    "Dropout2d": Case("Dropout2d", (), {}, (4, 6, 5, 3)),
    "Dropout3d": Case("Dropout3d", (), {}, (4, 6, 2, 3, 2)),
    "AlphaDropout": Case("AlphaDropout", (), {}, (4, 6)),
    "FeatureAlphaDropout": Case("FeatureAlphaDropout", (), {}, (4, 6, 5)),
    "DropPath": Case("DropPath", (), {}, (8, 6)),
    "BatchNorm1d": Case("BatchNorm1d", (6,), {}, (4, 6)),
    "BatchNorm2d": Case("BatchNorm2d", (6,), {}, (4, 6, 5, 3)),
    "BatchNorm3d": Case("BatchNorm3d", (6,), {}, (4, 6, 2, 3, 2)),
    "SyncBatchNorm": Case("SyncBatchNorm", (6,), {}, (4, 6, 5)),
    "GroupNorm": Case("GroupNorm", (2, 6), {}, (4, 6, 5)),
    "InstanceNorm1d": Case("InstanceNorm1d", (6, 1e-5, 0.1, True, True), {}, (4, 6, 5)),
    "InstanceNorm2d": Case("InstanceNorm2d", (6,), {}, (4, 6, 5, 3)),
    "InstanceNorm3d": Case("InstanceNorm3d", (6,), {}, (4, 6, 2, 3, 2)),
    "LayerNorm": Case("LayerNorm", (6,), {}, (4, 6)),
    "DropoutAddLayerNorm": Case("DropoutAddLayerNorm", (6,), {}, (4, 6)),
    "LocalResponseNorm": Case("LocalResponseNorm", (3,), {}, (4, 6, 5)),
    "GaussianNoise": Case("GaussianNoise", (), {}, (4, 6)),
    "GaussianNoise multiplicative": Case("GaussianNoise", (), {"mode": "multiplicative"}, (4, 6)),
    "DropConnectConv2d": Case("DropConnectConv2d", (6, 4, 3), {}, (4, 6, 5, 5)),
    "DropConnectLinear": _linear("DropConnectLinear"),
    "DropConnectLinear group": _linear("DropConnectLinear", mode="group", group_size=2),
    "DropConnectLinear batch": _linear("DropConnectLinear", mode="batch"),
    "DropConnectLinear flipout": _linear("DropConnectLinear", mode="flipout"),
    "DropConnectLinear gaussian": _linear("DropConnectLinear", mode="gaussian"),
    "DropConnectLinear silu": _linear("DropConnectLinear", activation="silu", samples=8),
    "NoisyLinear": _linear("NoisyLinear"),
    "NoisyLinear multiplicative": _linear("NoisyLinear", mode="multiplicative"),
    "NoisyLinear factorised": _linear("NoisyLinear", mode="factorised"),
    "NoisyLinear learned": _linear("NoisyLinear", learn_sigma=True),
}
assert {case.layer for case in LAYERS.values()} == set(fnn.__all__), "a layer is missing here"
