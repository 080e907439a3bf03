"""Parameters that are spread over processes (DTensor: FSDP2, tensor parallelism), for the optimizers.

An elementwise step is the same step on every piece, so the optimizers work on the pieces: ``local`` gives the memory
that this process holds, with no dispatch of DTensor between it and the kernels. State is made of the parameter itself
(``torch.zeros_like(p)``), so that it is a DTensor with the parameter's mesh, placements, shape and strides, uneven and
empty pieces included, and a checkpoint can be loaded with another number of processes.

Only sums over a whole tensor meet the other processes: the norm of the gradients and that of a whole parameter. With
``Shards`` of a parameter as the key they are summed by this process first, and then once per key over the processes
that hold the other pieces. Replicas hold the same values: nothing is summed over them.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fastreg.ops.backend import PLAIN

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_distributed(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether ``x`` is a DTensor. Nothing is, until somebody imports that class."""
    if type(x) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The piece of ``x`` that this process holds, as a view of the same memory; ``x`` itself if it is whole.

    Read it anew for every step: FSDP puts other memory under its parameters.
    """
    if type(x) in PLAIN or not is_distributed(x):
        return x
    piece = x._local_tensor  # to_local() makes a new view of a parameter each time
    return piece.wait() if hasattr(piece, "wait") else piece  # a collective that is still under way


def local_pairs(
    targets: Sequence[Tensor], sources: Sequence[Tensor], names: Sequence[str] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The pieces of targets and sources, where those of a pair are the same pieces of two tensors.

    Raises:
        ValueError: the pieces of a pair are cut otherwise. names: of the pairs.
    """
    if {*map(type, targets), *map(type, sources)} <= {*PLAIN}:
        return list(targets), list(sources)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if is_distributed(target) and is_distributed(source):
            before, now = ((x.device_mesh, x.placements) for x in (target, source))
            if before != now:
                name = names[i] if names else f"tensor {i}"
                raise ValueError(f"{name} is in the pieces {now}, but was in {before}")
    return list(map(local, targets)), list(map(local, sources))


@torch.no_grad()
def local_gradient(p: Tensor) -> Tensor | None:
    """The piece of the gradient of ``p`` that belongs to this process' piece of ``p``.

    A gradient with other placements (partial sums, as tensor parallelism leaves them to replicated parameters) takes
    those of the parameter first, as in torch's own steps. All processes of the mesh have to take part in that.
    """
    gradient = p.grad
    if gradient is None:
        return None
    if is_distributed(p) != is_distributed(gradient):
        kinds = ("torch.Tensor", "DTensor")
        raise RuntimeError(
            f"got mixed torch.Tensor and DTensor: a parameter that is a {kinds[is_distributed(p)]} "
            f"needs a gradient of the same kind, but got a {kinds[is_distributed(gradient)]}"
        )
    if is_distributed(p) and is_distributed(gradient) and gradient.placements != p.placements:
        gradient = gradient.redistribute(p.device_mesh, p.placements)
    return local(gradient)


class Shards(NamedTuple):
    """Which processes hold the other pieces of a tensor: those along these dimensions of the mesh."""

    mesh: "DeviceMesh"
    dimensions: tuple[int, ...]

    def sum_(self, sums: Tensor) -> Tensor:
        """Sums the elements of ``sums`` over the processes, in place: a collective, for all of them to call."""
        if self.mesh.get_coordinate() is None:  # no piece is here
            return sums
        there = sums
        if (
            sums.device.type != self.mesh.device_type
        ):  # parameters may be offloaded from where processes communicate
            there = sums.to(self.mesh.device_type)  # the current device, as in FSDP
        for dimension in self.dimensions:
            torch.distributed.all_reduce(there, group=self.mesh.get_group(dimension))
        return sums if there is sums else sums.copy_(there)


def shards(x: Tensor) -> Shards | None:
    """Over whom a sum over all of ``x`` goes: the key to sum by. None where this process holds all of it."""
    if not is_distributed(x):
        return None
    if any(placement.is_partial() for placement in x.placements):
        raise RuntimeError(f"a parameter cannot be a partial sum, but got the placements {x.placements}")
    dimensions = tuple(i for i, placement in enumerate(x.placements) if not placement.is_replicate())
    return Shards(x.device_mesh, dimensions) if dimensions else None


def by_shards(parameters: Iterable[Tensor]) -> dict[Shards | None, list[Tensor]]:
    """The parameters by who holds their pieces, in an order that all processes share.

    Sum over all parameters of the optimizer and not only over those with a gradient: a process whose gradients are
    absent has to take part in the others' sums.
    """
    found: dict[Shards | None, list[Tensor]] = {}
    for p in parameters:
        found.setdefault(shards(p), []).append(p)
    return found


def total(sums: dict[Shards | None, Tensor]) -> Tensor:
    """The sum over all processes of what each has summed over its pieces, by key. Consumes ``sums``."""
    found = [part if key is None else key.sum_(part) for key, part in sums.items()]
    return found[0] if len(found) == 1 else torch.stack([part.to(found[0]) for part in found]).sum(0)


def check_max_norm(p: Tensor, dim: int | None) -> None:
    """Rows have to be whole on their process; the norm of a whole tensor goes over ``shards(p)``."""
    if dim is not None and is_distributed(p):
        for placement in p.placements:
            if not placement.is_replicate() and getattr(placement, "dim", None) != 0:
                raise RuntimeError(
                    "max_norm of each row needs rows that are whole on one process (Replicate or Shard(0)), "
                    f"but got a parameter with the placements {p.placements}"
                )
