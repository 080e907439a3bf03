"""What the normalization layers of fastreg add to torch's classes.

Each takes torch's constructor arguments and the keyword ``activation``, a name of
``fastreg.functional.ACTIVATIONS``; ``forward(input, *, residual=None)`` is ``activation(norm(input) + residual)``:
``residual`` is added to what the operation itself gives, and has the input's shape. Parameters, buffers,
``state_dict`` and errors are torch's.
"""

from typing import Any

from fastreg.nn.layer import Layer
from fastreg.ops.checks import check_activation


class FusedNorm(Layer):
    """Mixin, in front of torch's class: ``activation=``."""

    activation: str | None = None  # of layers whose class was changed: ``__init__`` did not run

    def applies_all(self) -> bool:
        """Whether the layer is nothing but activation(norm(input) + residual), with the activation named here."""
        return True

    def _make(self, *arguments: Any, activation: str | None, bias: bool = True) -> None:
        """The constructor, with torch's arguments as they are."""
        check_activation(activation)
        # torch 2.11 takes no such keyword, and refuses False.
        super().__init__(*arguments, **({} if bias else {"bias": False}))
        self.activation = activation

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"
