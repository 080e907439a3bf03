"""fastreg: hand-written Triton kernels for regularizing deep networks in PyTorch.

    import fastreg.nn as fnn           # modules, drop-in for torch.nn
    import fastreg.functional as F     # functions, drop-in for torch.nn.functional
"""

__version__ = "0.1.0"

from fastreg import functional, nn, random
from fastreg.nn.dropout import mc_dropout

__all__ = ["functional", "mc_dropout", "nn", "random"]
