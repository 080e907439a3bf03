"""Steps of optimizers: large parameters, a network, and very many tiny tensors."""

import torch

from fastreg.ops import optimizers as ops
from fastreg.ops.optimizers import Batch, Member, Rule

from .sass import Budget, Kernel, short_name

ADAM = Rule(adam=True, momentum=True)
SGD = Rule(adam=False, momentum=True)

# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles

SIZE = 1 << 27  # elements of one parameter


def kernels() -> list[Kernel]:
    """Whole tiles at aligned addresses: the others are loops of no turn."""
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    found = [
        variant("AdamW", ADAM, fp32, headline=True),
        variant("AdamW, clip, EMA", ADAM._replace(average=True), fp32, headline=True),
        variant("AdamW", ADAM, bf16, headline=True),
        variant("AdamW, random rounding", ADAM._replace(at_random=True), bf16),
        variant("AdamW, masters", ADAM._replace(master=True), bf16, moments=fp32),
        variant(
            "AdamW, everything",
            ADAM._replace(amsgrad=True, cautious=True, average=True),
            fp32,
            everything=True,
        ),
        variant("AdamW", ADAM, fp64),
        variant("SGD, momentum", SGD, fp32, headline=True),
        variant("SGD, momentum", SGD._replace(nesterov=True), bf16, everything=True),
        variant("SGD", SGD._replace(momentum=False), fp32),
        variant("AdamW, max-norm of rows of 512", ADAM._replace(rows=True), fp32, row=512),
        variant("AdamW, max-norm of rows of 4096", ADAM._replace(rows=True), fp32, row=4096),
        variant("AdamW, max-norm of rows of 4096", ADAM._replace(rows=True, at_random=True), bf16, row=4096),
        variant("AdamW, max-norm of the tensor", ADAM._replace(rows=False), fp32),
    ]
    for dtype in (fp32, bf16):
        batch = batch_of(ADAM, dtype)
        found += [
            Kernel.of(
                f"{short_name(dtype)} squares of gradients",
                batch.squares(),
                SIZE,
                dtype.itemsize,
                trips=0,
                budget=Budget(**SCALARS, shared_bytes=64),
            )
        ]
    long = batch_of(ADAM._replace(rows=False), fp32)
    found += [
        Kernel.of(
            "fp32 projection of the tensor",
            long.project(),
            SIZE,
            2 * fp32.itemsize,
            trips=0,
            budget=Budget(**SCALARS),
        )
    ]
    return found


# The tables of a program: what it works on, its addresses, its numbers; and partial sums.
SCALARS = {"narrow_loads": 28, "narrow_stores": 2}
# Of the short step of SGD the assembler unrolls the tail, and leaves a part of it outside of the loop.
UNROLLED = {"narrow_loads": 48, "narrow_stores": 8}
# Accesses of 16 bytes are four elements a thread to one type and eight to the other; and sums over rows.
EXCHANGED = 8192


def budget_of(rule: Rule, dtype: torch.dtype) -> Budget:
    exchanges = EXCHANGED if rule.master or rule.rows is not None else 0
    short = not rule.adam and dtype == torch.float32
    # Philox and a sum over rows in 14 bytes: as long as the memory of a B200.
    least = {80: 1, 90: 1, 100: 0.99} if rule.at_random and rule.rows else 1
    return Budget(**(UNROLLED if short else SCALARS), shared_bytes=exchanges, min_headroom=least)


def batch_of(rule: Rule, dtype: torch.dtype, moments: torch.dtype | None = None, row: int = 0) -> Batch:
    def like(dtype, wanted=True):
        shape = (SIZE // row, row) if row else (SIZE,)
        return torch.empty(shape, dtype=dtype, device="meta") if wanted else None

    wide = ops.compute_dtype(dtype)
    member = Member(
        like(dtype),
        like(dtype),
        like(moments or dtype, rule.momentum),
        like(moments or dtype, rule.adam),
        like(moments or dtype, rule.amsgrad),
        like(wide, rule.master),
        like(wide, rule.average),
        torch.empty((), device="meta"),
    )
    return Batch(rule, [member])


def variant(name, rule, dtype, *, moments=None, row=0, everything=False, headline=False) -> Kernel:
    batch = batch_of(rule, dtype, moments, row)
    launch = batch.step(pulled=everything, shrunk=everything)
    return Kernel.of(
        f"{short_name(dtype)} {name}",
        launch,
        SIZE,
        bytes_of(rule, dtype, moments or dtype),
        trips=0,
        budget=budget_of(rule, dtype),
        headline=headline,
    )


def bytes_of(rule: Rule, dtype: torch.dtype, moments: torch.dtype) -> int:
    """An element: gradients are read, parameters and state read and written; beside a master, p is written only."""
    wide = ops.compute_dtype(dtype).itemsize
    states = (rule.momentum + rule.adam + rule.amsgrad) * moments.itemsize
    parameter = dtype.itemsize + 2 * wide if rule.master else 2 * dtype.itemsize
    return dtype.itemsize + parameter + 2 * states + 2 * wide * rule.average


CASES = ()
