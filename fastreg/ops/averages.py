"""Averages and snapshots of lists of tensors: the definition in ATen, and the launches of ``kernels/averages.py``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.backend import Launch
from fastreg.ops.bulk import addresses
from fastreg.ops.multi_tensor import Table, table_of, taken, type_of
from fastreg.ops.optimizers import compute_dtype, same_layout

if backend.HAS_TRITON:
    from fastreg.kernels import averages as kernels

TILE = 4096  # elements of a program
BYTES = 16384  # that a program copies
WARPS = 8


def _follow(table: Table, weight: float, dtypes: tuple[torch.dtype, torch.dtype]) -> Launch:
    arguments = {
        "entries_ptr": table.entries,
        "chunks_ptr": table.chunks,
        "weight": weight,
        "tensors": table.tensors,
        "programs": table.programs,
        "A": type_of(dtypes[0]),
        "P": type_of(dtypes[1]),
        "COMPUTE": type_of(_compute_dtype(*dtypes)),
        "BLOCK": TILE,
        "VECTOR": 16 // min(dtype.itemsize for dtype in dtypes),
        "num_warps": WARPS,
    }
    return Launch(kernels.follow, (table.programs,), arguments)


def _copy_if(table: Table, flag: Tensor | None) -> Launch:
    arguments = {
        "entries_ptr": table.entries,
        "chunks_ptr": table.chunks,
        "flag_ptr": flag,
        "tensors": table.tensors,
        "programs": table.programs,
        "BLOCK": BYTES,
        "num_warps": WARPS,
    }
    return Launch(kernels.copy_if, (table.programs,), arguments)


def _compute_dtype(a: torch.dtype, p: torch.dtype) -> torch.dtype:
    return compute_dtype(torch.promote_types(a, p))


def _table(pairs: list[tuple[Tensor, Tensor]], lengths: tuple[int, ...], size: int) -> Table:
    targets, sources = (tuple(addresses(tensors).tolist()) for tensors in zip(*pairs, strict=True))
    return table_of(pairs[0][0].device, (targets, lengths, sources), size)


def _written(tensors: Sequence[Tensor]) -> None:
    """What kernels write is behind the back of autograd."""
    tensors = [x for x in tensors if not x.is_inference()]
    if tensors:
        torch.autograd.graph.increment_version(tensors)


@torch.no_grad()
def follow_(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float) -> None:
    """a <- a + (1 - decay) (p - a), in fp32 (fp64) and rounded once. What is not floating point is copied."""
    kinds: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    rest = []
    for a, p, *known in zip(averages, tensors, taken(averages), taken(tensors), strict=True):
        floats = a.is_floating_point() and p.is_floating_point()
        if not floats and not a.is_complex():
            rest.append((a, p))
        elif all(known) and a.device == p.device and same_layout(a, p):
            kinds.setdefault((a.device, a.dtype, p.dtype), []).append((a, p))
        else:
            compute = a.dtype if a.is_complex() else _compute_dtype(a.dtype, p.dtype)
            wide, p = a.to(compute), p.to(a.device, compute)
            a.copy_(torch.where(wide == p, wide, torch.lerp(wide, p, 1 - decay)))
    for (device, *dtypes), pairs in kinds.items():
        pairs = [pair for pair in pairs if pair[0].numel()]
        if pairs:
            table = _table(pairs, tuple(a.numel() for a, _ in pairs), TILE)
            _follow(table, 1 - decay, dtypes).run(device)
            _written([a for a, _ in pairs])
    if rest:
        torch._foreach_copy_(*map(list, zip(*rest, strict=True)))


@torch.no_grad()
def copy_if_(targets: Sequence[Tensor], sources: Sequence[Tensor], flag: Tensor) -> None:
    """Copies where ``flag``, a bool tensor of one element, is set; without waiting for it if it is on their device."""
    kinds: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    targets, sources = list(map(_floats, targets)), list(map(_floats, sources))
    for target, source, *known in zip(targets, sources, taken(targets), taken(sources), strict=True):
        same = target.dtype == source.dtype and target.device == source.device and same_layout(target, source)
        if all(known) and same and flag.device == target.device:
            kinds.setdefault(target.device, []).append((target, source))
        elif target.is_cuda and flag.device == target.device:
            copy_where_(target, source, flag)
        elif flag:
            target.copy_(source)
    for device, pairs in kinds.items():
        pairs = [pair for pair in pairs if pair[0].numel()]
        if pairs:
            table = _table(pairs, tuple(t.numel() * t.element_size() for t, _ in pairs), BYTES)
            _copy_if(table, flag).run(device)
            _written([target for target, _ in pairs])


def copy_where_(target: Tensor, source: Tensor, flag: Tensor) -> None:
    """The definition, where nobody is to wait for the flag."""
    target.copy_(torch.where(flag.reshape(()), source.to(target.device, target.dtype), target))


_FLOATS = {torch.int64: torch.float64, torch.int32: torch.float32, torch.int16: torch.float16}


def _floats(x: Tensor) -> Tensor:
    """Integers seen as floats of their size, so that they are copied together with the others, byte by byte."""
    return x.view(_FLOATS[x.dtype]) if x.dtype in _FLOATS else x
