"""What a pretended GPU records: launches, calls of ATen, compiled variants."""

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from pretended_gpu import Graph

LARGEST_GRID = (2**31 - 1, 65535, 65535)


class Launched(NamedTuple):
    """One launch of a kernel."""

    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # by name, those that Triton took for constants among them
    constants: frozenset[str]
    types: dict[str, str]  # Triton's, of what is no constant
    options: dict[str, Any]
    stream: int
    graph: "Graph | None"  # that records it
    values: dict[str, Any] = MappingProxyType({})  # of tensors of one element, at that moment

    def check(self, device: int) -> None:
        """Raises where CUDA or Triton's launcher would, or where a kernel would read what it cannot reach."""
        limits = zip(self.grid, LARGEST_GRID, strict=True)
        # Triton multiplies the three as C's int, and launches nothing where the product is not positive.
        if any(not 0 <= size <= most for size, most in limits) or math.prod(self.grid) >= 1 << 31:
            raise RuntimeError(
                f"Triton Error [CUDA]: invalid argument: {self.name} with a grid of {self.grid}"
            )
        for name, kind in self.types.items():
            value = self.arguments[name]
            if kind.startswith("*") and value is not None:
                if not isinstance(value, torch.Tensor):
                    raise TypeError(f"{self.name}: {name} is a pointer, but {type(value).__name__} was given")
                if value.numel() and value.device != torch.device("cuda", device):
                    raise ValueError(
                        f"{self.name}: pointer argument {name} is on {value.device}, the launch on cuda:{device}"
                    )
            elif kind[0] in "iu" and kind[1:].isdigit():
                bits, signed = int(kind[1:]), kind[0] == "i" and kind != "i1"
                least, most = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
                if not least <= int(value) < most:
                    raise OverflowError(f"{self.name}: {name} = {value} does not fit {kind}")


class Operation(NamedTuple):
    """One call of ATen that gives the device work."""

    name: str
    stream: int
    graph: "Graph | None"


class Compiled(NamedTuple):
    """A variant of a kernel that had to be made."""

    name: str
    types: dict[str, Any]
    constants: dict[str, Any]
