"""Averages and snapshots of lists of tensors: the definition in ATen, and the launches of ``kernels/averages.py``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.backend import Launch
from fastreg.ops.layout import can_be_written, check_inference, check_written
from fastreg.ops.multi_tensor import foreach
from fastreg.ops.multi_tensor.bulk import addresses, by_kind, remembered
from fastreg.ops.multi_tensor.optimizers import compute_dtype, same_layout
from fastreg.ops.multi_tensor.tables import Table, table_of, taken, type_of

if backend.HAS_TRITON:
    from fastreg.kernels import averages as kernels

TILE = 4096  # elements of a program
BYTES = 16384  # that a program copies
WARPS = 8


def follow_launch(table: Table, weight: float, dtypes: tuple[torch.dtype, torch.dtype]) -> Launch:
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


def copy_if_launch(table: Table, flag: Tensor | None) -> Launch:
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


class _Launched(NamedTuple):
    """Pairs that go in one launch, by their places in the two lists."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[tuple[int, ...], ...]  # of the table: where targets lie, lengths, where sources lie
    places: list[int]
    written: list[int]  # those of them whose versions count


def _at(places: list[int], x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [x[i] for i in places], [y[i] for i in places]


def _launched(
    kinds: dict[tuple, list[int]], targets: Sequence[Tensor], sources: Sequence[Tensor], in_bytes: bool
) -> list[_Launched]:
    found = []
    for (device, *dtypes), places in kinds.items():
        places = [i for i in places if targets[i].numel()]
        if places:
            to, of = _at(places, targets, sources)
            lengths = tuple(x.nbytes if in_bytes else x.numel() for x in to)
            rows = tuple(addresses(to).tolist()), lengths, tuple(addresses(of).tolist())
            written = [i for i in places if not targets[i].is_inference()]
            found.append(_Launched(device, tuple(dtypes), rows, places, written))
    return found


def _say_written(tensors: Sequence[Tensor], places: list[int]) -> None:
    """Tells autograd of tensors that a kernel wrote, which it does not see."""
    if places:
        torch.autograd.graph.increment_version([tensors[i] for i in places])


def _unlike(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[int]:
    """The places of sources that do not go into their targets, element by element."""
    return [
        i
        for i, (t, s) in enumerate(zip(targets, sources, strict=True))
        if t.shape != s.shape
        or t.is_meta != s.is_meta
        or not torch.can_cast(s.dtype, t.dtype)
        or not can_be_written(t)
        or s.layout != torch.strided
    ]


def _of_inference(targets: Sequence[Tensor]) -> list[int]:
    return [i for i, t in enumerate(targets) if t.is_inference()]


def _refuse(
    unlike: list[int],
    of_inference: list[int],
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    names: Sequence[str] | None,
) -> None:
    for i in of_inference[:1]:
        check_inference(targets[i], names[i] if names else f"tensor {i}")
    if unlike:
        i = unlike[0]
        name = names[i] if names else f"tensor {i}"
        check_written(targets[i], name)
        if sources[i].layout != torch.strided:
            check_written(sources[i], name)
        source, target = (
            f"{tuple(x.shape)} of {x.dtype} on {x.device.type}" for x in (sources[i], targets[i])
        )
        raise ValueError(f"{name}: a tensor {source} does not fit the one that is kept, {target}")


class _Averaged(NamedTuple):
    """Launches for the tensors that kernels average, and the places of the others."""

    launched: list[_Launched]
    listed: dict[tuple[torch.dtype, bool], list[int]]  # by torch, of one dtype, trained or not
    copied: list[int]
    defined: list[int]
    unlike: list[int]  # cannot be averaged
    of_inference: list[int]  # written in inference mode alone


@by_kind
@remembered
def _averaged(averages: Sequence[Tensor], tensors: Sequence[Tensor]) -> _Averaged:
    found = _Averaged([], {}, [], [], _unlike(averages, tensors), _of_inference(averages))
    if found.unlike:
        return found
    kinds: dict[tuple, list[int]] = {}
    for i, (a, p, *known) in enumerate(zip(averages, tensors, taken(averages), taken(tensors), strict=True)):
        floats = a.is_floating_point() and p.is_floating_point()
        if not floats and not a.is_complex():
            found.copied.append(i)
        elif all(known) and a.device == p.device and same_layout(a, p):
            kinds.setdefault((a.device, a.dtype, p.dtype), []).append(i)
        elif floats and a.dtype == p.dtype and foreach.on_cpu(a) and foreach.on_cpu(p):
            found.listed.setdefault((a.dtype, p.requires_grad), []).append(i)
        else:
            found.defined.append(i)
    found.launched.extend(_launched(kinds, averages, tensors, in_bytes=False))
    return found


@torch.no_grad()
def follow_(
    averages: Sequence[Tensor],
    tensors: Sequence[Tensor],
    decay: float,
    names: Sequence[str] | None = None,
) -> None:
    """a <- a + (1 - decay) (p - a), in fp32 (fp64) and rounded once. What is not floating point is copied.

    names: of the tensors, for errors.
    """
    found = _averaged(averages, tensors)
    _refuse(found.unlike, found.of_inference, averages, tensors, names)
    for one in found.launched:
        table = table_of(one.device, one.rows, TILE)
        follow_launch(table, 1 - decay, one.dtypes).run(one.device)
        _say_written(averages, one.written)
    for (_, trained), places in found.listed.items():
        foreach.follow_(*_at(places, averages, tensors), weight=1 - decay, finite=trained)
    for i in found.defined:
        a, p = averages[i], tensors[i]
        compute = a.dtype if a.is_complex() else _compute_dtype(a.dtype, p.dtype)
        wide, p = a.to(compute), p.to(a.device, compute)
        a.copy_(torch.where(wide == p, wide, torch.lerp(wide, p, 1 - decay)))
    if found.copied:
        torch._foreach_copy_(*_at(found.copied, averages, tensors))


@torch.no_grad()
def copy_(targets: list[Tensor], sources: list[Tensor], names: Sequence[str] | None = None) -> None:
    """names: of the tensors, for errors."""
    _refuse(_unlike(targets, sources), _of_inference(targets), targets, sources, names)
    if targets:
        torch._foreach_copy_(targets, sources)


class _Copied(NamedTuple):
    """Launches for the tensors that kernels copy, and the places of the others."""

    launched: list[_Launched]
    waiting: list[int]  # copied by the definition, for which nobody waits
    rest: list[int]
    unlike: list[int]  # cannot be copied
    of_inference: list[int]  # written in inference mode alone


@by_kind
@remembered
def _copied(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> _Copied:
    found = _Copied([], [], [], _unlike(targets, sources), _of_inference(targets))
    if found.unlike:
        return found
    targets, sources = list(map(_floats, targets)), list(map(_floats, sources))
    kinds: dict[tuple, list[int]] = {}
    for i, (t, s, *known) in enumerate(zip(targets, sources, taken(targets), taken(sources), strict=True)):
        if all(known) and t.dtype == s.dtype and t.device == s.device and same_layout(t, s):
            kinds.setdefault((t.device,), []).append(i)
        elif t.is_cuda:
            found.waiting.append(i)
        else:
            found.rest.append(i)
    found.launched.extend(_launched(kinds, targets, sources, in_bytes=True))
    return found


@torch.no_grad()
def copy_if_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    flag: Tensor,
    names: Sequence[str] | None = None,
) -> None:
    """Copies where ``flag``, a bool tensor of one element, is set; without waiting for it if it is on their device.

    names: of the tensors, for errors.
    """
    found = _copied(targets, sources)
    _refuse(found.unlike, found.of_inference, targets, sources, names)
    rest = list(found.rest)
    for one in found.launched:
        if flag.device == one.device:
            copy_if_launch(table_of(one.device, one.rows, BYTES), flag).run(one.device)
            _say_written(targets, one.written)
        else:
            rest += one.places
    for i in found.waiting:
        if flag.device == targets[i].device:
            copy_where_(targets[i], sources[i], flag)
        else:
            rest.append(i)
    if rest and flag:
        torch._foreach_copy_(*_at(rest, targets, sources))


def copy_where_(target: Tensor, source: Tensor, flag: Tensor) -> None:
    """The definition, where nobody is to wait for the flag."""
    target.copy_(torch.where(flag.reshape(()), source.to(target.device, target.dtype), target))


_FLOATS = {torch.int64: torch.float64, torch.int32: torch.float32, torch.int16: torch.float16}


def _floats(x: Tensor) -> Tensor:
    """Integers seen as floats of their size, so that they are copied together with the others, byte by byte."""
    return x.view(_FLOATS[x.dtype]) if x.dtype in _FLOATS else x
