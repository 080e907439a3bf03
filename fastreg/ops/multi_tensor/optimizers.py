"""One step of an optimizer: the definition in ATen, and the launches of ``kernels/optimizers.py``.

An optimizer (``fastreg/optim``) hands over tensors and the numbers of their groups. Here nothing is remembered between
two steps but the tables of addresses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.backend import Launch
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div, is_dense
from fastreg.ops.multi_tensor.bulk import addresses
from fastreg.ops.multi_tensor.tables import Table, deal, deal_rows, type_of, upload
from fastreg.random import Stream

if backend.HAS_TRITON:
    from fastreg.kernels import optimizers as kernels

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TILE = 2048  # elements of a program
ROW_MOST = 4096  # elements of a row that is projected in its tile


@dataclass
class Numbers:
    """The numbers of a group, in the order of ``kernels/optimizers.py``. Neutral ones switch an option off."""

    lr: float | Tensor
    lr_0: float = 0.0  # of decouple_lr; 0: decay goes with lr
    l2: float | Tensor = 0.0
    decay: float | Tensor = 0.0
    beta_1: float = 0.0  # or momentum
    beta_2: float = 0.0  # or dampening
    eps: float = 0.0
    sign: float = 1.0
    l1_subgradient: float = 0.0
    l1_proximal: float = 0.0
    max_norm: float = math.inf
    max_grad_norm: float = math.inf
    follow: float = 0.0  # 1 - ema_decay


NUMBERS = [field.name for field in fields(Numbers)]
WIDTH = 16  # of a row of the table of groups


class Rule(NamedTuple):
    """The terms of a step, without their numbers. Each rule, with each set of dtypes, is a kernel of its own."""

    adam: bool
    momentum: bool  # there is a first moment
    nesterov: bool = False
    amsgrad: bool = False
    cautious: bool = False
    rows: bool | None = None  # max-norm of each row, of the whole tensor, or None
    master: bool = False
    average: bool = False
    at_random: bool = False


@dataclass
class Member:
    """A parameter with all that belongs to its step: plain tensors, of one dense layout."""

    parameter: Tensor
    gradient: Tensor
    first: Tensor | None = None  # momentum_buffer, exp_avg
    second: Tensor | None = None  # exp_avg_sq
    largest: Tensor | None = None  # max_exp_avg_sq
    master: Tensor | None = None
    average: Tensor | None = None
    step: Tensor | None = None  # fp32 [] on the device
    group: int = 0
    ordinal: int = 0  # its place in the optimizer


def row_of(parameter: Tensor, rule: Rule) -> int:
    """Elements over which the max-norm goes; 0 without one. Rows are those of weights: of two dimensions and more."""
    if rule.rows is None or (rule.rows and parameter.dim() < 2):
        return 0
    count = parameter.shape[0] if rule.rows else 1
    return parameter.numel() // count if count else 0


def rows_lie_together(parameter: Tensor, rule: Rule) -> bool:
    """Whether each row that is projected is one stretch of memory."""
    row = row_of(parameter, rule) if rule.rows else 0
    return not row or parameter.shape[0] == 1 or parameter.stride(0) == row


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def decay_rate(numbers: Numbers) -> float:
    """The factor of lr in the decoupled decay."""
    return float(numbers.decay) / (numbers.lr_0 or 1.0)


# --- the definition, in ATen ------------------------------------------------------------------------------


def resolve(numbers: Numbers, adam: bool, t: float, gain: float = 1.0) -> dict[str, float]:
    """The scalars that ``advance`` computes for step ``t``. gain: the factor of unscaling and clipping."""
    lr = float(numbers.lr)
    moves = lr != 0
    found = {
        "gain": numbers.sign * gain,
        "coupled": float(numbers.l2),
        "subgradient": numbers.l1_subgradient,
        "size": lr,
        "keep": 1 - lr * decay_rate(numbers),
        "threshold": lr * numbers.l1_proximal,
        "radius": numbers.max_norm if moves else math.inf,
        "follow": numbers.follow if moves else 0.0,
    }
    if adam:
        correction = 1 - numbers.beta_2**t
        found |= {
            "size": lr / (1 - numbers.beta_1**t),
            "decay_1": numbers.beta_1,
            "gain_1": 1 - numbers.beta_1,
            "decay_2": numbers.beta_2,
            "gain_2": 1 - numbers.beta_2,
            "root": 1 / math.sqrt(correction),
            "eps": numbers.eps,
        }
    else:
        first = t <= 1
        found |= {
            "decay_1": 0.0 if first else numbers.beta_1,
            "gain_1": 1.0 if first else 1 - numbers.beta_2,
            "decay_2": numbers.beta_1,
        }
    return found


def clipped(norm: float, most: float) -> float:
    """The factor that clips gradients of this norm. A NaN makes all of them NaN, as in torch."""
    return 1.0 if norm <= most else most / norm


def define(member: Member, rule: Rule, numbers: Numbers, gain: float = 1.0, shards: Any = None) -> None:
    """One step of one tensor, in place. gain: of unscaling and clipping; shards: over whom the norm of p goes."""
    if member.step is not None:
        member.step += 1
    t = math.inf if member.step is None else member.step.item()
    s = resolve(numbers, rule.adam, t, gain)
    p = member.parameter
    compute = compute_dtype(p.dtype)
    value = (p if member.master is None else member.master).to(compute)
    g = member.gradient.to(compute) * s["gain"]
    if s["coupled"] or s["subgradient"]:
        g = g + s["coupled"] * value + s["subgradient"] * value.sign()
    first, second, largest = member.first, member.second, member.largest
    if rule.momentum:
        assert first is not None
        m = (first.to(compute) * s["decay_1"] if s["decay_1"] else 0) + g * s["gain_1"]
        first.copy_(m)
    if rule.adam:
        assert second is not None
        v = second.to(compute) * s["decay_2"] + g * g * s["gain_2"]
        second.copy_(v)
        if rule.amsgrad:
            assert largest is not None
            v = torch.maximum(largest.to(compute), v)
            largest.copy_(v)
        update = s["size"] * m / (v.sqrt() * s["root"] + s["eps"])
    elif rule.momentum:
        update = s["size"] * (g + s["decay_2"] * m if rule.nesterov else m)
    else:
        update = s["size"] * g
    decayed = value * s["keep"]
    if rule.cautious:
        decayed = torch.where(update * value >= 0, decayed, value)
    value = decayed - update
    value = _constrained(value, rule, s, shards)
    stored = value
    if rule.at_random:
        stored = _rounded_at_random(value, member.ordinal, int(t))
    p.copy_(stored)
    if member.master is not None:
        member.master.copy_(value)
    if member.average is not None:
        member.average.lerp_(value if member.master is not None else p.to(compute), s["follow"])


def _constrained(value: Tensor, rule: Rule, s: dict[str, float], shards: Any) -> Tensor:
    """Shrunk by the proximal L1, then projected into the ball of the max-norm."""
    if s["threshold"]:
        value = value - value.clamp(-s["threshold"], s["threshold"])  # exact zeros; a NaN stays
    if row_of(value, rule) or shards is not None:
        dims = tuple(range(1, value.dim())) if rule.rows else tuple(range(value.dim()))
        squared = value.square().sum(dims, keepdim=True) if dims else value.square()
        if shards is not None:
            squared = shards.sum_(squared)
        norm = squared.sqrt()
        if (norm > s["radius"]).any():
            # Times 1 is the same to the bit.
            value = value * torch.where(norm > s["radius"], s["radius"] / norm, 1.0)
    return value


def _rounded_at_random(x: Tensor, key: int, count: int) -> Tensor:
    """fp32 to what bf16 can hold: 16 random bits are added, and the last 16 cut off."""
    order = x.permute(_memory_order(x))
    element = torch.arange(x.numel(), dtype=torch.int64, device=x.device).view(order.shape)
    bits = random.lanes(element, Stream(key, count)).to(torch.int64)
    pattern = order.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = ((pattern + bits) & 0xFFFF0000).to(torch.int64)
    rounded = (
        torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32).view(torch.float32)
    )
    rounded = torch.where((pattern & 0x7F800000) == 0x7F800000, order, rounded)
    places = _memory_order(x)
    return rounded.permute([places.index(i) for i in range(x.dim())])


def _memory_order(x: Tensor) -> list[int]:
    """All dimensions, from the outermost in memory on."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


# --- the launches -----------------------------------------------------------------------------------------


def takes(p: Tensor, g: Tensor, rule: Rule) -> bool:
    """Whether the kernels take this parameter with this gradient; one of another layout is copied for them."""
    if not backend.runs_kernels(p) or not is_dense(p) or not backend.is_plain(g):
        return False
    return g.dtype in DTYPES and g.layout == torch.strided and rows_lie_together(p, rule)


class Form(NamedTuple):
    """The kind of a batch: tensors of one form are stepped by one kernel."""

    rule: Rule
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of parameters, gradients, and moments
    counts: bool  # there are counters of steps
    projection: str
    width: int  # of the tiles of a projection

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.dtypes[0])

    @property
    def block(self) -> int:
        return max(TILE, self.width)

    @property
    def vector(self) -> int:
        return 16 // min(dtype.itemsize for dtype in (*self.dtypes, self.compute))

    @property
    def warps(self) -> int:
        """Sixteen elements a thread share the reading of its tables; eight, where a sum over rows needs registers."""
        return self.block // (256 if self.projection == "rows" else 512)


def _tables(entries: Tensor, chunks: Tensor) -> dict[str, Any]:
    tensors, programs = entries.shape[1], chunks.shape[1]
    return {"entries_ptr": entries, "tensors": tensors, "chunks_ptr": chunks, "programs": programs}


@planned
def squares_launches(entries: Tensor, chunks: Tensor, partials: Tensor, form: Form) -> list[Launch]:
    """Sums of the squares of the gradients, into ``partials``."""
    dtype = form.dtypes[1]
    arguments = {
        **_tables(entries, chunks),
        "partials_ptr": partials,
        "DTYPE": type_of(dtype),
        "BLOCK": form.block,
        "VECTOR": 16 // dtype.itemsize,
        "num_warps": form.warps,
    }
    return [Launch(kernels.squares, (chunks.shape[1],), arguments)]


@planned
def advance_launches(
    entries: Tensor,
    groups: Tensor,
    scalars: Tensor,
    squared: Tensor | None,
    norm: Tensor | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    form: Form,
) -> list[Launch]:
    arguments = {
        "entries_ptr": entries,
        "tensors": entries.shape[1],
        "groups_ptr": groups,
        "scalars_ptr": scalars,
        "squared_ptr": squared,
        "norm_ptr": norm,
        "scale_ptr": scale,
        "found_inf_ptr": found_inf,
        "ADAM": form.rule.adam,
        "COUNTS": form.counts,
        "BLOCK": 128,
        "num_warps": 4,
    }
    return [Launch(kernels.advance, (ceil_div(entries.shape[1], 128),), arguments)]


@planned
def step_launches(
    entries: Tensor,
    chunks: Tensor,
    scalars: Tensor,
    partials: Tensor,
    pulled: bool,
    shrunk: bool,
    form: Form,
) -> list[Launch]:
    """pulled, shrunk: some group has a coupled penalty, or a proximal L1."""
    rule, (p, g, s) = form.rule, form.dtypes
    arguments = {
        **_tables(entries, chunks),
        "scalars_ptr": scalars,
        "partials_ptr": partials if form.projection == "partial" else None,
        "plan": kernels.Plan(
            adam=rule.adam,
            momentum=rule.momentum,
            nesterov=rule.nesterov,
            amsgrad=rule.amsgrad,
            cautious=rule.cautious,
            pulled=pulled,
            shrunk=shrunk,
            projection=form.projection,
            master=rule.master,
            average=rule.average,
            at_random=rule.at_random,
            parameter=type_of(p),
            gradient=type_of(g),
            moment=type_of(s),
            compute=type_of(form.compute),
            width=form.width,
            block=form.block,
            vector=form.vector,
        ),
        "num_warps": form.warps,
    }
    return [Launch(kernels.step, (chunks.shape[1],), arguments)]


@planned
def project_launches(
    entries: Tensor, chunks: Tensor, chunk_units: Tensor, scalars: Tensor, squared: Tensor, form: Form
) -> list[Launch]:
    arguments = {
        **_tables(entries, chunks),
        "chunk_units_ptr": chunk_units,
        "scalars_ptr": scalars,
        "squared_ptr": squared,
        "plan": kernels.Projection(
            form.rule.master,
            form.rule.average,
            type_of(form.dtypes[0]),
            type_of(form.compute),
            form.block,
            form.vector,
        ),
        "num_warps": form.warps,
    }
    return [Launch(kernels.project, (chunks.shape[1],), arguments)]


@planned
def fold_launches(partials: Tensor, units: Tensor, squared: Tensor) -> list[Launch]:
    """Sums the partial sums of each unit: int64 ``[2, units]``, its first one and how many it has."""
    arguments = {
        "partials_ptr": partials,
        "units_ptr": units,
        "squared_ptr": squared,
        "units": len(squared),
        "BLOCK": 128,
        "num_warps": 1,
    }
    return [Launch(kernels.fold, (len(squared),), arguments)]


class Batch:
    """The tensors of one rule, of the same dtypes on the same device: all of them in one launch a stage."""

    LISTS = ("parameter", "gradient", "first", "second", "largest", "master", "average", "step")
    GRADIENT = LISTS.index("gradient")

    def __init__(self, rule: Rule, members: Sequence[Member], shards: Any = None):
        """shards: the processes that hold the other pieces, where the max-norm is of whole parameters."""
        self.count, self.shards = len(members), shards
        p, g, first = members[0].parameter, members[0].gradient, members[0].first
        self.device = p.device
        self.groups = sorted({member.group for member in members})
        dtypes = p.dtype, g.dtype, p.dtype if first is None else first.dtype
        self.form = form = Form(rule, dtypes, members[0].step is not None, *projection(p, rule, shards))
        numel = np.array([member.parameter.numel() for member in members])
        rows = np.array([row_of(member.parameter, rule) for member in members])
        if form.projection == "partial":
            counts = numel // np.maximum(rows, 1) if rule.rows else np.ones_like(rows)
            chunks, unit, pieces = deal_rows(rows, counts, form.block)
            self.units = upload(np.stack([np.cumsum(pieces) - pieces, pieces]), self.device)
            self.chunk_units = upload(unit, self.device)
            self.squared = torch.zeros(len(pieces), dtype=form.compute, device=self.device)
        else:
            sizes = (
                rows * (form.block // form.width)
                if form.projection == "rows"
                else np.full_like(numel, form.block)
            )
            tensor, start = deal(numel, np.maximum(sizes, 1))
            chunks = tensor, start, np.minimum(start + sizes[tensor], numel[tensor])
        lists = [addresses([getattr(member, name) for member in members]) for name in self.LISTS]
        groups = [self.groups.index(member.group) for member in members]
        ordinals = [member.ordinal for member in members]
        self.table = Table([*lists, rows, groups, ordinals], chunks, self.device)
        self.scalars = torch.empty(
            len(members), kernels.SCALARS.value, dtype=torch.float64, device=self.device
        )
        self.partials = torch.empty(self.table.programs, dtype=form.compute, device=self.device)

    def move_gradients(self, addresses: np.ndarray) -> None:
        self.table.move(self.GRADIENT, addresses)

    @property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return self.table.entries, self.table.chunks

    def sum_squares(self) -> None:
        """Writes sums of squared gradients into ``partials``."""
        squares_launches.run(*self._tables, self.partials, self.form)

    def advance(
        self,
        groups: Tensor,
        squared: Tensor | None = None,
        norm: Tensor | None = None,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """groups: fp64 ``[len(self.groups), WIDTH]``; the others of one element, fp64, fp32, fp32, fp32."""
        advance_launches.run(
            self.table.entries, groups, self.scalars, squared, norm, scale, found_inf, self.form
        )

    def step(self, pulled: bool, shrunk: bool) -> None:
        """pulled, shrunk: some group has a coupled penalty, or a proximal L1."""
        step_launches.run(*self._tables, self.scalars, self.partials, pulled, shrunk, self.form)

    def fold(self) -> None:
        fold_launches.run(self.partials, self.units, self.squared)

    def project(self) -> None:
        project_launches.run(*self._tables, self.chunk_units, self.scalars, self.squared, self.form)


def projection(parameter: Tensor, rule: Rule, shards: Any = None) -> tuple[str, int]:
    """The kind of projection for a max-norm, and the width of its tiles."""
    row = row_of(parameter, rule)
    if shards is None and not row:
        return "none", 1
    if shards is None and row <= ROW_MOST:
        return "rows", max(8, 1 << (row - 1).bit_length())
    return "partial", 1


def check_beside(parameter: Tensor, x: Tensor, name: str) -> None:
    """Raises where ``x`` cannot be stepped together with the parameter, element by element, by its address.

    name: what ``x`` is to the parameter.
    """
    if x.device != parameter.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{parameter.device} and {x.device}! The first is that of a parameter, the second that of its {name}"
        )
    if x.shape != parameter.shape:
        raise RuntimeError(
            f"The size of tensor a {tuple(parameter.shape)} must match the size of tensor b {tuple(x.shape)}: "
            f"a is a parameter, b its {name}"
        )


def same_strides(shape: Sequence[int], x: Sequence[int], y: Sequence[int]) -> bool:
    """Whether tensors of one shape with these strides have the same order of elements. (One element has but one.)"""
    return x == y or all(a == b or size == 1 for a, b, size in zip(x, y, shape, strict=True))


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same shape and the same order of elements in memory."""
    return x.shape == y.shape and same_strides(x.shape, x.stride(), y.stride())


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the layout of ``like``: itself wherever it has it."""
    return x if same_layout(x, like) else torch.empty_like(like, dtype=x.dtype).copy_(x)
