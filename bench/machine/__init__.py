"""Executes the PTX that Triton compiles for a GPU, on CPU memory: see README.md.

machine = attach("sm_90")
kernel[grid](x, y)  # CPU tensors
machine.detach()
"""

from typing import Any

from .execute import Launch, Options, Program
from .memory import Fault, Region
from .parse import Unknown

__all__ = ["TARGETS", "Fault", "Launch", "Options", "Program", "Region", "Unknown", "attach"]

TARGETS = ("sm_80", "sm_90", "sm_100")


def attach(target: str, options: Options | None = None, keeps: bool = False) -> Any:
    """From here on Triton's launches run on this machine (a :class:`.driver.Machine`), until ``machine.detach()``.

    Kernels have to be compiled ones: TRITON_INTERPRET=0. keeps: ``machine.launched`` holds what every launch did.
    """
    from .driver import attached  # imports Triton

    if target not in TARGETS:
        raise ValueError(f"no such target: {target} (there is {', '.join(TARGETS)})")
    return attached(int(target.removeprefix("sm_")), options or Options(), keeps)
