"""What torch's tools are told of fastreg's layers."""

from torch.fx import Tracer
from torch.nn import Module


class Layer:
    """Mixin of all layers, in front of torch's class."""

    def __prepare_scriptable__(self):
        """torch.jit.script asks for it before it compiles anything. Nothing else does."""
        raise RuntimeError(
            f"torch.jit.script cannot compile fastreg.nn.{type(self).__name__}: "
            "use torch.compile, torch.export or torch.jit.trace, or script torch's own layer"
        )


# torch.fx keeps torch's own layers as nodes of its graphs, where they obey train() and eval() later on. It knows them
# by the name of the module that defines their class, and so do we.
_is_leaf_module = Tracer.is_leaf_module


def _is_leaf_module_or_ours(tracer: Tracer, module: Module, name: str) -> bool:
    return module.__module__.startswith("fastreg.nn.") or _is_leaf_module(tracer, module, name)


Tracer.is_leaf_module = _is_leaf_module_or_ours
