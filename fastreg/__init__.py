"""fastreg: hand-written Triton kernels for regularizing deep networks in PyTorch.

``fastreg.nn`` holds modules, drop-in for ``torch.nn``; ``fastreg.functional`` functions, drop-in for
``torch.nn.functional``; ``fastreg.optim`` optimizers, drop-in for ``torch.optim``; ``fastreg.penalties`` terms of the
loss on the weights; ``fastreg.random`` the definition of every random number.
"""

__version__ = "0.1.0"

from fastreg import functional, nn, optim, penalties, random
from fastreg.averages import BestWeights, ExponentialMovingAverage
from fastreg.folding import fold_batch_norm
from fastreg.nn.dropout import mc_dropout
from fastreg.population import update_bn

__all__ = [
    "BestWeights",
    "ExponentialMovingAverage",
    "fold_batch_norm",
    "functional",
    "mc_dropout",
    "nn",
    "optim",
    "penalties",
    "random",
    "update_bn",
]
