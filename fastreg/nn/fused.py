"""What the normalization layers of fastreg add to torch's classes.

Each takes torch's constructor arguments and the keyword ``activation``, a name of
``fastreg.ops.fused.ACTIVATIONS``; ``forward(input, *, residual=None)`` is ``activation(norm(input) + residual)``, where
the residual has the input's shape. Parameters, buffers, ``state_dict`` and errors are torch's.
"""

from torch import Tensor
from torch.fx import Proxy

from fastreg.ops.fused import check_activation


class FusedNorm:
    """Mixin, in front of torch's class: ``activation=``."""

    activation: str | None = None  # of layers unpickled from torch's classes, or whose class was changed

    def __init__(self, *arguments, activation: str | None = None, **keywords) -> None:
        check_activation(activation)
        super().__init__(*arguments, **keywords)
        self.activation = activation

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"

    def _is_leaf(self, input: Tensor | Proxy) -> bool:
        """Whether this is a call in a trace of ``torch.fx``, to be kept as one: torch's own layers are."""
        return isinstance(input, Proxy) and input.tracer.root is not self

    def _leaf(self, input: Proxy, residual: Proxy | None) -> Proxy:
        keywords = {} if residual is None else {"residual": residual}
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), keywords)
