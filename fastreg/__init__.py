"""fastreg: hand-written Triton kernels for regularizing deep networks in PyTorch.

``fastreg.nn`` holds modules, drop-in for ``torch.nn``; ``fastreg.functional`` functions, drop-in for
``torch.nn.functional``; ``fastreg.random`` the definition of every random number.
"""

__version__ = "0.1.0"

from fastreg import functional, nn, random
from fastreg.nn.dropout import mc_dropout

__all__ = ["functional", "mc_dropout", "nn", "random"]
