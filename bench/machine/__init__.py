"""Executes the PTX that Triton compiles for a GPU, on CPU memory: see README.md.

machine = attach("sm_90")
kernel[grid](x, y)  # CPU tensors
"""

from .driver import TARGETS, Launched, Machine, attach
from .execute import Launch, Options, Program
from .memory import Fault, Region
from .parse import Unknown

__all__ = [
    "TARGETS",
    "Fault",
    "Launch",
    "Launched",
    "Machine",
    "Options",
    "Program",
    "Region",
    "Unknown",
    "attach",
]
