"""Activation modules by the names that the kernels know, and what is left of one that another layer applies."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastreg.blocks.swap import origin, original_type
from fastreg.nn.layer import Layer

_NAMES: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.LeakyReLU: lambda m: "leaky_relu" if m.negative_slope == 0.01 else None,
    nn.GELU: lambda m: {"none": "gelu", "tanh": "gelu_tanh"}.get(m.approximate),
    nn.SiLU: lambda m: "silu",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.Tanh: lambda m: "tanh",
    nn.ELU: lambda m: "elu" if m.alpha == 1.0 else None,
    nn.Mish: lambda m: "mish",
    nn.Hardswish: lambda m: "hardswish",
    nn.ReLU6: lambda m: "relu6",
    nn.Hardsigmoid: lambda m: "hardsigmoid",
}


def register(names: dict[type[nn.Module], Callable[[Any], str | None]]) -> None:
    """Adds the activation modules of a library."""
    _NAMES.update(names)


def activation_name(module: nn.Module) -> str | None:
    """The name of ``fastreg.functional.ACTIVATIONS`` that computes what ``module`` does, or None."""
    name = _NAMES.get(original_type(module))
    return None if name is None else name(module)


def is_activation(module: nn.Module) -> bool:
    """Whether it is an activation of torch or of a library, among those that the kernels have or not."""
    found = original_type(module)
    return found in _NAMES or found.__module__ == nn.ReLU.__module__


class Absorbed(Layer, nn.Identity):
    """An activation that the layer before it applies in its own pass: the identity, under the activation's name.

    Where that layer is replaced by one that does not apply it, as ``SyncBatchNorm.convert_sync_batchnorm`` does, this
    module computes the activation itself again.
    """

    activation: str
    absorbed_by: tuple[tuple[nn.Module, str], ...]  # parents, and the names of their children that apply it

    def forward(self, input: Tensor) -> Tensor:
        applied = [
            getattr(getattr(parent, name, None), "activation", None) == self.activation
            for parent, name in self.absorbed_by
        ]
        if all(applied):
            return input
        if any(applied):
            raise RuntimeError(
                f"some of the layers that applied this {self.activation} were replaced, and others not: "
                "call fastreg.revert(model), then fastreg.convert(model)"
            )
        return self.unabsorbed(input)

    def unabsorbed(self, input: Tensor) -> Tensor:
        """The activation itself, by the class that it had."""
        found = origin(self)
        assert found is not None
        return found.type.forward(self, input)

    def extra_repr(self) -> str:
        return f"{self.activation} of {', '.join(name for _, name in self.absorbed_by)}"
