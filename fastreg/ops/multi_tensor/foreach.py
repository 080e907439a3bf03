"""Lists of CPU tensors: steps of optimizers, averages, projections and norms, by torch's fused and foreach functions.

One call takes all tensors, where a loop in Python pays several microseconds a tensor and operation. Torch's fused steps
walk over memory: parameter, gradient and state share a dtype and a dense layout. The tensors of ``project_`` and
``squares`` are dense, too.

``step_`` is ``ops.optimizers.define`` in torch's words. Around torch's step come

    before    max_grad_norm, unscaling, l1 as a subgradient: a changed copy of the gradients;
              the decay of SGDW, the decay that is cautious: on the parameters
    after     the proximal l1, max_norm, the average

and weight_decay, decouple_lr, maximize, AMSGrad and Nesterov are arguments of that step.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from fastreg.ops.backend import PLAIN
from fastreg.ops.layout import is_dense
from fastreg.ops.multi_tensor.optimizers import (
    DTYPES,
    Member,
    Numbers,
    Rule,
    compute_dtype,
    decay_rate,
    rows_lie_together,
    same_layout,
)

PORTION = 1 << 20  # elements that are copied at a time
SUMMED = 1 << 14  # elements whose squares torch may add up one after another
BLOCK = 4096  # and of a partial sum, where there are more

_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is a strided CPU tensor, and exactly Tensor or Parameter."""
    return type(x) in PLAIN and x.device.type == "cpu" and x.layout == torch.strided


def takes(x: Tensor) -> bool:
    return on_cpu(x) and is_dense(x)


def walks(member: Member, rule: Rule) -> bool:
    """Whether ``step_`` takes a parameter: torch's fused step walks over the memory of all its tensors at once."""
    p = member.parameter
    # Until torch 2.14 the fused SGD is wrong from the 17th element of 16 bits on.
    dtypes = DTYPES if rule.adam else DTYPES[:2]
    own = (member.gradient, member.first, member.second, member.largest, member.average)
    return (
        takes(p)
        and p.dtype in dtypes
        and rows_lie_together(p, rule)
        and not (rule.master or rule.at_random)
        and all(takes(x) and x.dtype == p.dtype and same_layout(x, p) for x in own if x is not None)
    )


Tensors = list[Tensor] | tuple[Tensor, ...]
"""The lists of torch's foreach functions. They return tuples."""


class Lists(NamedTuple):
    """The tensors of one rule, dtype and group. An empty list where the rule has none."""

    parameter: Tensors
    gradient: Tensors
    first: Tensors  # momentum_buffer, exp_avg
    second: Tensors  # exp_avg_sq
    largest: Tensors  # max_exp_avg_sq
    average: Tensors
    step: Tensors

    def at(self, places: Sequence[int]) -> "Lists":
        return Lists(*([tensors[i] for i in places] if tensors else [] for tensors in self))

    def stretch(self, i: int, start: int, count: int) -> "Lists":
        """``count`` elements of tensor i in memory order, from ``start`` on; its step whole."""
        pieces = (
            [x[i].as_strided((count,), (1,), x[i].storage_offset() + start)] if x else [] for x in self[:-1]
        )
        return Lists._make((*pieces, self.step[i : i + 1]))


def _portions(x: Lists) -> Iterator[Lists]:
    """In parts of ``PORTION`` elements, so that copies stay in the cache, in memory that is there already."""
    places: list[int] = []
    total = 0
    for i, count in enumerate(map(Tensor.numel, x.parameter)):
        if places and total + count > PORTION:
            yield x.at(places)
            places, total = [], 0
        if count > PORTION:
            for start in range(0, count, PORTION):
                yield x.stretch(i, start, min(PORTION, count - start))
        else:
            places.append(i)
            total += count
    if places:
        yield x.at(places)


def step_(x: Lists, rule: Rule, numbers: Numbers, gain: float = 1.0, shards: Any = None) -> None:
    """One step of all tensors, in place. gain: of unscaling and clipping; shards: over whom the norm of each goes."""
    if x.step:
        torch._foreach_add_(x.step, _ONE, alpha=1.0)
    copies = gain != 1 or numbers.l1_subgradient or rule.cautious
    for part in _portions(x) if copies else [x]:
        for first, alike in _by_first_step(part, rule):
            _update_(alike, rule, numbers, gain, first)
    lr = float(numbers.lr)
    if not lr:
        return
    if numbers.l1_proximal:
        for p in x.parameter:
            softshrink(p, lr * numbers.l1_proximal, out=p)  # type: ignore[call-arg]  # the stub has no out
    if rule.rows is not None:
        project_(x.parameter, numbers.max_norm, rule.rows, shards)
    if x.average:
        torch._foreach_lerp_(x.average, x.parameter, numbers.follow)


def _by_first_step(x: Lists, rule: Rule) -> Iterator[tuple[bool, Lists]]:
    """Tensors whose first step this is, which SGD does not dampen, apart from the others."""
    if rule.adam or not x.step:
        yield False, x
        return
    counts = [step.item() for step in x.step]
    for first in (True, False):
        places = [i for i, count in enumerate(counts) if (count <= 1) is first]
        if places:
            yield first, x.at(places)


def _update_(x: Lists, rule: Rule, numbers: Numbers, gain: float, first: bool) -> None:
    """Torch's step, with what changes gradients and weights before it."""
    p, g, sign = x.parameter, x.gradient, numbers.sign
    beta_1, beta_2 = float(numbers.beta_1), float(numbers.beta_2)
    lr, decay = float(numbers.lr), decay_rate(numbers)
    if rule.cautious:
        gain, sign = gain * sign, 1.0
    if gain != 1:
        g = torch._foreach_mul(g, _scalar(gain, g))
    if numbers.l1_subgradient:
        g = torch._foreach_add(g, torch._foreach_sign(p), alpha=sign * numbers.l1_subgradient)
    if rule.cautious:
        _decay_cautiously_(p, _direction(x._replace(gradient=g), rule, beta_1, beta_2, first), lr * decay)
        decay = 0.0
    settings: dict[str, Any] = {"lr": lr, "maximize": sign < 0, "grad_scale": None, "found_inf": None}
    if rule.adam:
        fused = torch._fused_adam_ if numbers.l2 else torch._fused_adamw_
        settings |= {"beta1": beta_1, "beta2": beta_2, "eps": numbers.eps, "amsgrad": rule.amsgrad}
        decay = float(numbers.l2) if numbers.l2 else decay
        fused(p, g, x.first, x.second, x.largest, x.step, weight_decay=decay, **settings)
        return
    if decay:
        torch._foreach_mul_(p, _scalar(1 - lr * decay, p))
    settings |= {"momentum": beta_1, "dampening": beta_2, "nesterov": rule.nesterov, "is_first_step": first}
    torch._fused_sgd_(p, g, x.first, weight_decay=float(numbers.l2), **settings)


def _scalar(value: float, beside: Tensors) -> Tensor:
    """Torch would make a tensor of a number anew for each of the list."""
    return torch.tensor(value, dtype=compute_dtype(beside[0].dtype), device="cpu")


def _direction(x: Lists, rule: Rule, beta_1: float, beta_2: float, first: bool) -> Tensors:
    """New tensors of the sign of the update, which torch's step makes later."""
    if rule.adam:
        return torch._foreach_lerp(x.first, x.gradient, 1 - beta_1)
    if not rule.momentum or first:
        return torch._foreach_mul(x.gradient, 1.0)
    ahead = torch._foreach_mul(x.first, beta_1)
    torch._foreach_add_(ahead, x.gradient, alpha=1 - beta_2)
    return torch._foreach_add(x.gradient, ahead, alpha=beta_1) if rule.nesterov else ahead


def _decay_cautiously_(ps: Tensors, directions: Tensors, rate: float) -> None:
    """p <- p (1 - rate) where the direction and p are not of opposite signs. Consumes the directions."""
    torch._foreach_mul_(directions, ps)
    for x in directions:
        x.ge_(0)  # 1 or 0; torch has no foreach function for it
    torch._foreach_mul_(ps, torch._foreach_add([_ONE] * len(ps), directions, alpha=-rate))


# --- norms ------------------------------------------------------------------------------------------------


def _matrix(x: Tensor, rows: bool) -> Tensor:
    """A dense tensor as ``[x.shape[0], elements of a row]``, or as one row, in memory order."""
    if rows and x.dim() == 2 and x.is_contiguous():
        return x
    count = x.shape[0] if rows else 1
    length = x.numel() // count
    return x.as_strided((count, length), (length, 1))


def _row_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of the rows of a dense matrix.

    Torch adds up the squares of a row one after another, which is wrong by percents after 2^26 of them. Long rows are
    cut into blocks.
    """
    rows, length = x.shape
    if length <= SUMMED:
        return torch.linalg.vector_norm(x, 2, 1, dtype=dtype)
    count, rest = divmod(length, BLOCK)
    blocks = x.as_strided((rows, count, BLOCK), (length, BLOCK, 1))
    norms = torch.linalg.vector_norm(blocks, 2, 2, dtype=dtype)
    if rest:
        ends = torch.linalg.vector_norm(x[:, -rest:], 2, 1, keepdim=True, dtype=dtype)
        norms = torch.cat([norms, ends], 1)
    return torch.linalg.vector_norm(norms, 2, 1)


def _norms(tensors: Tensors) -> Tensor:
    """The norm of each of some dense tensors of one dtype, at least in fp32."""
    dtype = compute_dtype(tensors[0].dtype)
    if max(map(Tensor.numel, tensors)) <= SUMMED:
        return torch.stack(torch._foreach_norm(tensors, 2, dtype))
    return torch.cat([_row_norms(_matrix(x, rows=False), dtype) for x in tensors])


def squares(tensors: Tensors) -> Tensor:
    """fp64 []: the sum of the squares of all elements of dense tensors of one dtype."""
    found = _norms(tensors).double().square().sum()
    if not found.isfinite():  # squares of more than fp32 holds
        wide = (torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in tensors)
        return functools.reduce(torch.add, wide)
    return found


def project_(ps: Tensors, radius: float, rows: bool, shards: Any = None) -> None:
    """Projects dense tensors of one dtype into a ball, in place: each of them, or each of their rows.

    What lies inside is not written. shards: the processes that hold the other pieces of each tensor.
    """
    ps = [p for p in ps if p.numel() or shards is not None]
    if not ps:
        return
    if rows:
        ps, dtype = [_matrix(p, rows=True) for p in ps], compute_dtype(ps[0].dtype)
        norms = torch.cat([_row_norms(p, dtype) for p in ps])
    else:
        norms = _norms(ps)
    if shards is not None:
        norms = shards.sum_(norms.square_()).sqrt_()
    outside = norms > radius
    if not outside.any():
        return
    gains = torch.where(outside, radius / norms, 1.0)  # times 1 is the same to the bit
    if rows:
        counts = list(map(len, ps))
        factors = gains[:, None].split(counts)
        ends = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64, device="cpu")
        outside = outside.cumsum(0)  # how many so far
        outside = torch.cat([outside.new_zeros(1), outside])[ends].diff() > 0
    else:
        factors = gains.unbind()
    written = outside.tolist()
    torch._foreach_mul_(list(itertools.compress(ps, written)), list(itertools.compress(factors, written)))


# --- averages ---------------------------------------------------------------------------------------------


def follow_(averages: Tensors, tensors: Tensors, weight: float, finite: bool) -> None:
    """a <- a + weight (p - a), for pairs of one dtype.

    finite: no tensor has an infinity. Where this is not known, an infinity that both have stays; torch's is NaN then.
    """
    if not tensors:
        return
    if finite or torch.stack(torch._foreach_norm(tensors)).isfinite().all():
        torch._foreach_lerp_(averages, tensors, weight)
        return
    for a, p in zip(averages, tensors, strict=True):
        a.copy_(torch.where(a == p, a, torch.lerp(a, p, weight)))
