"""Penalties on lists of tensors, and projections: the definition in ATen, and the launches of ``kernels/penalties.py``.

What the kernels do not take (CPU tensors, views with gaps, ``torch.func`` transforms, ``torch.compile``) goes to the
definition, tensor by tensor, and so do derivatives of the gradient.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.backend import Launch
from fastreg.ops.multi_tensor import foreach
from fastreg.ops.multi_tensor.bulk import addresses, by_kind, remembered
from fastreg.ops.multi_tensor.optimizers import ROW_MOST, compute_dtype, fold_launches, same_layout
from fastreg.ops.multi_tensor.tables import (
    Table,
    deal_rows,
    kept_by_stream,
    table_of,
    taken,
    type_of,
    upload,
)

if backend.HAS_TRITON:
    from fastreg.kernels import penalties as kernels

TILE = 4096  # elements of a program
WARPS = 8


class Form(NamedTuple):
    """The sum of l1 |p - mean| + l2 / 2 (p - mean)^2."""

    l1: float = 0.0
    l2: float = 0.0
    mean: float = 0.0


# --- the definition, in ATen ------------------------------------------------------------------------------


def _centred(p: Tensor, form: Form) -> Tensor:
    x = p.to(compute_dtype(p.dtype))
    return x - form.mean if form.mean else x


def _value(p: Tensor, form: Form) -> Tensor:
    x = _centred(p, form)
    value = x.new_zeros(())
    if form.l1:
        value = value + form.l1 * x.abs().sum()
    if form.l2:
        value = value + 0.5 * form.l2 * x.square().sum()
    return value


def _slope(p: Tensor, form: Form, gain: Tensor | float) -> Tensor:
    """The gradient times ``gain``, in the dtype of p. Can be differentiated."""
    x = _centred(p, form)
    slope = form.l2 * x + (form.l1 * x.sign() if form.l1 else 0.0)
    return (slope * gain).to(p.dtype)


def _result_dtype(ps: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in ps) else torch.float32


# --- the launches -----------------------------------------------------------------------------------------


def penalty_launch(
    table: Table,
    form: Form,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    partials: Tensor | None,
    gain: Tensor | None = None,
    how: str = "none",
    rows: bool = False,
) -> Launch:
    arguments = {
        "entries_ptr": table.entries,
        "chunks_ptr": table.chunks,
        "partials_ptr": partials,
        "gain_ptr": gain,
        **form._asdict(),
        "tensors": table.tensors,
        "programs": table.programs,
        "plan": kernels.Plan(
            l1=form.l1 != 0,
            l2=form.l2 != 0,
            centred=form.mean != 0,
            how=how,
            rows=rows,
            parameter=type_of(dtypes[0]),
            gradient=type_of(dtypes[1]),
            compute=type_of(compute_dtype(dtypes[0])),
            block=TILE,
            vector=16 // min(dtype.itemsize for dtype in dtypes),
        ),
        "num_warps": WARPS,
    }
    return Launch(kernels.penalize, (table.programs,), arguments)


def _run(
    ps: Sequence[Tensor],
    form: Form,
    gs: Sequence[Tensor] | None = None,
    *,
    gain: Tensor | None = None,
    how: str = "none",
    valued: bool = True,
) -> list[Tensor]:
    """The kernel on tensors that it takes, with gradients of their layout. Returns sums: the value is their sum."""
    kinds: dict[tuple, list[int]] = {}
    for i, p in enumerate(ps):
        if p.numel():
            kinds.setdefault((p.device, p.dtype, (p if gs is None else gs[i]).dtype), []).append(i)
    found = []
    for (device, of_p, of_g), places in kinds.items():
        lists = [ps, gs] if gs is not None else [ps]
        first, *rest = (tuple(addresses([tensors[i] for i in places]).tolist()) for tensors in lists)
        table = table_of(device, (first, tuple(ps[i].numel() for i in places), *rest), TILE)
        partials = torch.empty(table.programs, dtype=torch.float64, device=device) if valued else None
        there = gain if gain is None else gain.to(device)
        penalty_launch(table, form, (of_p, of_g), partials=partials, gain=there, how=how).run(device)
        if partials is not None:
            found.append(partials.sum())
    return found


# --- autograd ---------------------------------------------------------------------------------------------


class _Penalty(torch.autograd.Function):
    """The value of tensors that the kernel takes. Saves the tensors, and nothing of their size."""

    @staticmethod
    def forward(ctx, form, dtype, *ps):
        ctx.form = form
        ctx.save_for_backward(*ps)
        return _sum(_run(ps, form), dtype, ps[0].device)

    @staticmethod
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[2:]
        ps = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(ps)
        simple = not torch.is_grad_enabled() and taken([dy])[0]
        launched = [i for i, known in enumerate(taken(ps)) if wanted[i] and simple and known]
        written = [torch.empty_like(ps[i]) for i in launched]
        for i, g in zip(launched, written, strict=True):
            found[i] = g
        _run([ps[i] for i in launched], ctx.form, written, gain=dy, how="write", valued=False)
        for i, p in enumerate(ps):
            if wanted[i] and found[i] is None:
                found[i] = _slope(p, ctx.form, dy.to(p.device, compute_dtype(p.dtype)))
        return None, None, *found


def _sum(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not parts:
        return torch.zeros((), dtype=dtype, device=device)
    if len(parts) == 1:
        return parts[0].to(device, dtype)
    return functools.reduce(torch.add, (part.to(device, torch.float64) for part in parts)).to(dtype)


def penalty(ps: Sequence[Tensor], form: Form) -> Tensor:
    """The value, fp32 (fp64 where a tensor is), on the device of the first tensor. Differentiable."""
    dtype = _result_dtype(ps)
    known = taken(ps)
    launched = list(itertools.compress(ps, known))
    parts = [_value(p, form) for p, its in zip(ps, known, strict=True) if not its]
    if launched:
        parts.append(_Penalty.apply(form, dtype, *launched))
    return _sum(parts, dtype, ps[0].device if ps else torch.device("cpu"))


def _fits_lists(p: Tensor, g: Tensor) -> bool:
    """Whether ``foreach`` takes a parameter and its gradient, and rounds no more often than the definition."""
    return p.dtype == g.dtype == compute_dtype(p.dtype) and foreach.takes(p) and g.is_cpu and p.numel() > 0


@torch.no_grad()
def penalize_(ps: Sequence[Tensor], gs: Sequence[Tensor], fresh: Sequence[bool], form: Form) -> Tensor:
    """The value; its gradients are added to ``gs``, or written where ``fresh``."""
    dtype = _result_dtype(ps)
    kinds: dict[str, list[int]] = {"add": [], "write": [], "definition": []}
    for i, (p, g, *known) in enumerate(zip(ps, gs, taken(ps), taken(gs), strict=True)):
        fits = all(known) and same_layout(p, g)
        kinds["definition" if not fits else "write" if fresh[i] else "add"].append(i)
    parts = []
    for how in ("add", "write"):
        parts += _run([ps[i] for i in kinds[how]], form, [gs[i] for i in kinds[how]], how=how)
    lists: dict[torch.dtype, list[int]] = {}
    for i in kinds["definition"]:
        parts.append(_value(ps[i], form))
        if not form.mean and _fits_lists(ps[i], gs[i]):
            lists.setdefault(ps[i].dtype, []).append(i)
            if fresh[i]:
                gs[i].zero_()
            continue
        slope = _slope(ps[i], form, 1.0)
        gs[i].copy_(slope) if fresh[i] else gs[i].add_(slope)
    for places in lists.values():
        listed, slopes = ([x[i] for i in places] for x in (ps, gs))
        if form.l1:
            torch._foreach_add_(slopes, torch._foreach_sign(listed), alpha=form.l1)
        if form.l2:
            torch._foreach_add_(slopes, listed, alpha=form.l2)
    written = [gs[i] for i in kinds["add"] + kinds["write"] if not gs[i].is_inference()]
    if written:
        torch.autograd.graph.increment_version(written)
    return _sum(parts, dtype, ps[0].device if ps else torch.device("cpu"))


# --- projection -------------------------------------------------------------------------------------------


def _row_of(p: Tensor, rows: bool) -> int:
    """How many elements a norm goes over."""
    return p.numel() // (p.shape[0] if rows else 1)


def project_by_definition_(p: Tensor, radius: float, rows: bool, shards: Any = None) -> None:
    """shards: over whom the norm of a whole tensor goes, where other processes hold the rest of it."""
    x = p if p.is_complex() else p.to(compute_dtype(p.dtype))
    squared = x.abs().square().sum(tuple(range(int(rows), p.dim())), keepdim=True)
    norm = (squared if shards is None else shards.sum_(squared)).sqrt()
    p.copy_(torch.where(norm > radius, x * (radius / norm), x))


class _LongRows(NamedTuple):
    table: Table
    chunk_units: Tensor  # int64 [programs]: which row a tile is of
    units: Tensor  # int64 [2, rows]: the first tile of each, and how many it has


@kept_by_stream
def long_rows(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> _LongRows:
    """rows: of the table: addresses, elements, elements of a row."""
    _, numel, length = (np.array(row, dtype=np.int64) for row in rows)
    (tensor, first, _), row, tiles = deal_rows(length, numel // length, TILE)
    table = Table(rows, (tensor, first), device)
    return _LongRows(table, upload(row, device), upload(np.stack([np.cumsum(tiles) - tiles, tiles]), device))


def project_rows_launch(table: Table, radius: float, dtype: torch.dtype, width: int) -> Launch:
    arguments = {
        "entries_ptr": table.entries,
        "chunks_ptr": table.chunks,
        "radius": radius,
        "tensors": table.tensors,
        "programs": table.programs,
        "P": type_of(dtype),
        "COMPUTE": type_of(compute_dtype(dtype)),
        "WIDTH": width,
        "BLOCK": TILE,
        "VECTOR": 16 // dtype.itemsize,
        "num_warps": WARPS,
    }
    return Launch(kernels.project_rows, (table.programs,), arguments)


def shorten_launch(long: _LongRows, squared: Tensor, radius: float, dtype: torch.dtype) -> Launch:
    arguments = {
        "entries_ptr": long.table.entries,
        "chunks_ptr": long.table.chunks,
        "chunk_units_ptr": long.chunk_units,
        "squared_ptr": squared,
        "radius": radius,
        "tensors": long.table.tensors,
        "programs": long.table.programs,
        "P": type_of(dtype),
        "COMPUTE": type_of(compute_dtype(dtype)),
        "BLOCK": TILE,
        "VECTOR": 16 // dtype.itemsize,
        "num_warps": WARPS,
    }
    return Launch(kernels.shorten, (long.table.programs,), arguments)


class _Projected(NamedTuple):
    """Tensors that are projected in one launch, or in the three of long rows."""

    device: torch.device
    dtype: torch.dtype
    width: int  # of the tile of a row; 0: it takes several
    entries: tuple[tuple[int, ...], ...]  # of the table: addresses, elements, elements of a row


class _Projections(NamedTuple):
    """Launches for the tensors that kernels project, the places of those, and the places of the others."""

    launched: list[_Projected]
    written: list[int]
    listed: dict[torch.dtype, list[int]]  # on the CPU, in lists of a dtype
    defined: list[int]


@by_kind
@remembered
def _projections(ps: Sequence[Tensor], rows: bool) -> _Projections:
    kinds: dict[tuple, list[Tensor]] = {}
    found = _Projections([], [], {}, [])
    for i, (p, known) in enumerate(zip(ps, taken(ps), strict=True)):
        if not p.numel():
            continue
        row = _row_of(p, rows)
        together = not rows or p.shape[0] == 1 or p.stride(0) == row
        if known and together:
            width = max(8, 1 << (row - 1).bit_length()) if row <= ROW_MOST else 0
            kinds.setdefault((p.device, p.dtype, width), []).append(p)
            found.written.extend([] if p.is_inference() else [i])
        elif together and p.is_floating_point() and foreach.takes(p):
            found.listed.setdefault(p.dtype, []).append(i)
        else:
            found.defined.append(i)
    for (device, dtype, width), members in kinds.items():
        entries = (
            tuple(addresses(members).tolist()),
            tuple(p.numel() for p in members),
            tuple(_row_of(p, rows) for p in members),
        )
        found.launched.append(_Projected(device, dtype, width, entries))
    return found


def project_(ps: Sequence[Tensor], radius: float, rows: bool) -> None:
    """Projects tensors that are whole, in place: each row of them, or each of them."""
    found = _projections(ps, rows=rows)
    for i in found.defined:
        project_by_definition_(ps[i], radius, rows)
    for places in found.listed.values():
        foreach.project_([ps[i] for i in places], radius, rows)
    for device, dtype, width, entries in found.launched:
        if width:
            table = table_of(device, entries, tuple(row * (TILE // width) for row in entries[2]))
            project_rows_launch(table, radius, dtype, width).run(device)
            continue
        long = long_rows(device, entries)
        partials = torch.empty(long.table.programs, dtype=torch.float64, device=device)
        squared = torch.empty(long.units.shape[1], dtype=torch.float64, device=device)
        # Half of twice the squares: the same kernel as for penalties.
        penalty_launch(long.table, Form(l2=2.0), (dtype, dtype), partials=partials, rows=True).run(device)
        fold_launches.run(partials, long.units, squared)
        shorten_launch(long, squared, radius, dtype).run(device)
    if found.written:
        torch.autograd.graph.increment_version([ps[i] for i in found.written])
