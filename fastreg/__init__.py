"""fastreg: hand-written Triton kernels for regularizing deep networks in PyTorch.

``fastreg.nn`` holds modules, drop-in for ``torch.nn``; ``fastreg.functional`` functions, drop-in for
``torch.nn.functional``; ``fastreg.optim`` optimizers, drop-in for ``torch.optim``; ``fastreg.penalties`` terms of the
loss on the weights; ``fastreg.random`` the definition of every random number.

Everything is imported where it is first used, so that ``fastreg --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fastreg import functional, nn, optim, penalties, random
    from fastreg.averages import BestWeights, ExponentialMovingAverage
    from fastreg.conversion import convert, convert_optimizer, explain, revert
    from fastreg.folding import fold_batch_norm
    from fastreg.nn.dropout import mc_dropout
    from fastreg.population import update_bn

__all__ = [
    "BestWeights",
    "ExponentialMovingAverage",
    "convert",
    "convert_optimizer",
    "explain",
    "fold_batch_norm",
    "functional",
    "mc_dropout",
    "nn",
    "optim",
    "penalties",
    "random",
    "revert",
    "update_bn",
]

_DEFINED_IN = {
    "BestWeights": "averages",
    "ExponentialMovingAverage": "averages",
    "convert": "conversion",
    "convert_optimizer": "conversion",
    "explain": "conversion",
    "fold_batch_norm": "folding",
    "mc_dropout": "nn.dropout",
    "revert": "conversion",
    "update_bn": "population",
}


if not TYPE_CHECKING:  # a type checker would take any name for ours

    def __getattr__(name: str) -> Any:
        if name in _DEFINED_IN:
            found = getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
        elif name in __all__:
            found = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
