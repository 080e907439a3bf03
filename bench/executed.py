"""``fastreg inspect --execute``: what a declared form does when it runs, counted on executed PTX.

Some programs of the declared launch run on :mod:`.machine`, on memory of the declared size. Bytes of device memory are
those of the different sectors that they touch of each tensor, scaled to all programs; of a tensor that all share, such
as a bias, this is at most the whole of it, read or written once.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from .machine.counters import SECTOR, Counters
from .sass import InspectError, Kernel, binary_for, signature_of

ELEMENTS = 1 << 20  # that are worked on, of
PROGRAMS = 2, 256  # at least and at most so many programs
LARGEST = 1 << 25  # bytes that a program moves, and
MEMORY = 1 << 34  # bytes of all tensors, beyond which a form is left out
ALIGNED = 512  # bytes, as torch allocates on a GPU
GOLDEN = (5**0.5 - 1) / 2
CONTROL = ("bra", "bar", "ret", "exit", "barrier")  # not counted, as in the static count


@dataclass(frozen=True)
class Executed:
    """Per element, but for the ratio."""

    instructions: float  # of PTX
    bytes: float  # of device memory
    sectors: float  # bytes of the sectors that all requests ask for
    ratio: float  # of these sectors to the fewest that would hold what was asked for
    conflicts: float  # turns of shared memory beyond those of its bytes


def execute(kernel: Kernel, cc: int) -> Executed:
    """Runs a sample of the programs of a declared launch."""
    from .machine import Launch, Options, Program, Unknown

    launch, pointed_at = kernel.real() if kernel.real else (kernel.launch, [])
    if launch is None or ("entries_ptr" in launch.leaves and not pointed_at):
        raise InspectError(f"{kernel.name}: without its tables it cannot run")
    grid = (*launch.grid, 1, 1)[:3]
    moves = kernel.elements * kernel.bytes_per_element
    if moves > LARGEST:
        raise InspectError(f"{kernel.name}: {moves:.2g} bytes a program are too many to execute")
    tensors = {name: _real(value) for name, value in launch.leaves.items() if isinstance(value, torch.Tensor)}
    memory = [*tensors.items(), *((f"table -> {tuple(x.shape)} {x.dtype}", x) for x in pointed_at)]
    if sum(x.nbytes for _, x in memory) > MEMORY:
        raise InspectError(f"{kernel.name}: its tensors are too large to execute")
    numbers = sampled(prod(grid), kernel.elements)
    binary = binary_for(kernel, cc)
    try:
        program = Program(binary.asm["ptx"])
    except Unknown as error:
        raise InspectError(str(error)) from error
    run = Launch(
        program,
        grid,
        32 * kernel.num_warps,
        _parameters(kernel, launch.leaves | tensors),
        [_region(name, x) for name, x in memory],
        binary.metadata.shared,
        Options(ordered=False, counting=True, programs=numbers),
    )
    counters = run.run()
    scale = prod(grid) / len(numbers)
    moved = sum(_moved(counters, x, scale) for _, x in memory) / (prod(grid) * kernel.elements)
    return _per_element(counters, len(numbers) * kernel.elements, moved)


def _moved(counters: Counters, x: torch.Tensor, scale: float) -> float:
    """Bytes between device memory and one tensor in all of the launch."""
    from .machine.driver import extent

    start, end = extent(x)
    whole = -(-end // SECTOR) * SECTOR - start // SECTOR * SECTOR
    read, written = (min(whole, scale * bytes_) for bytes_ in counters.moved(start, end))
    return read + written


def absent(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory, as kernels are declared with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """The same with memory, which the system gives where it is touched."""
    return _real(absent(*shape, dtype=dtype))


def _real(x: torch.Tensor) -> torch.Tensor:
    """A tensor of zeros of this shape and layout; what has memory stays."""
    if x.device.type != "meta":
        return x
    count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = np.zeros(count * x.element_size() + ALIGNED, np.uint8)
    memory = memory[-memory.ctypes.data % ALIGNED :][: count * x.element_size()]
    return torch.from_numpy(memory).view(x.dtype).as_strided(x.shape, x.stride())


def _region(name: str, x: torch.Tensor) -> Any:
    from .machine import Region
    from .machine.driver import extent

    return Region(*extent(x), name)


def _parameters(kernel: Kernel, arguments: dict[str, Any]) -> list[bytes]:
    from .machine.driver import packed

    found = []
    for name, kind in signature_of(kernel).items():
        if kind != "constexpr":
            value = arguments[name]
            found.append(
                packed(
                    "u64" if kind.startswith("*") else kind, getattr(value, "data_ptr", lambda v=value: v)()
                )
            )
    return [*found, packed("u64", 0), packed("u64", 0)]  # Triton's scratch memory, of which there is none


def sampled(programs: int, elements: float) -> tuple[int, ...]:
    """Some of the programs, spread evenly and without a period: multiples of the golden ratio."""
    least, most = PROGRAMS
    count = min(programs, max(least, min(most, int(ELEMENTS / elements))))
    if count == programs:
        return tuple(range(programs))
    return tuple(sorted({int(i * GOLDEN % 1 * programs) for i in range(count)}))


def _per_element(found: Counters, ran: float, moved: float) -> Executed:
    instructions = sum(n for opcode, n in found.instructions.items() if opcode.split(".")[0] not in CONTROL)
    sectors = found.loads.sectors + found.stores.sectors
    return Executed(
        instructions=32 * instructions / ran,
        bytes=moved,
        sectors=SECTOR * sectors / ran,
        ratio=sectors / max(1, found.loads.fewest + found.stores.fewest),
        conflicts=found.conflicts / ran,
    )
