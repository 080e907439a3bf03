"""Modules, drop-in for ``torch.nn``: every class is a subclass of torch's own where torch has one."""

from fastreg.nn.dropout import Dropout

__all__ = ["Dropout"]
