"""Optimizers, drop-in for ``torch.optim``: every regularizer of the weights in the same pass over memory."""

from fastreg.optim.adam import Adam, AdamW
from fastreg.optim.sgd import SGD, SGDW

__all__ = ["SGD", "SGDW", "Adam", "AdamW"]
