"""fastreg's layers as torch's tools see them.

torch.fx keeps torch's own layers as nodes of its graphs, where they obey train() and eval() later on. Its tracers know
them by ``layer.__module__.startswith("torch.nn")``. So our layers say so when they are asked, while their classes say
where they are; and ``torch.fx.Tracer`` looks at the class as well, for layers whose class was changed say nothing.
"""

from typing import Any, NoReturn

from torch.fx import Tracer
from torch.nn import Module
from typing_extensions import Self


class Layer(Module):
    """Mixin of all layers, in front of torch's class."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        layer = super().__new__(cls)
        layer.__dict__["__module__"] = "torch.nn"
        return layer

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks for it before it compiles anything. Nothing else does."""
        raise RuntimeError(
            f"torch.jit.script cannot compile fastreg.nn.{type(self).__name__}: "
            "use torch.compile, torch.export or torch.jit.trace, or script torch's own layer"
        )


_is_leaf_module = Tracer.is_leaf_module


def _is_leaf_module_or_ours(self: Tracer, m: Module, module_qualified_name: str) -> bool:
    return isinstance(m, Layer) or _is_leaf_module(self, m, module_qualified_name)


Tracer.is_leaf_module = _is_leaf_module_or_ours  # type: ignore[method-assign]  # torch has no hook for it
