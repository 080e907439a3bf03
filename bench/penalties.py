"""Penalties with their gradients, and projections: what ``torch`` does in several passes over the weights."""

import torch

from fastreg import penalties
from fastreg.ops.multi_tensor import penalties as ops
from fastreg.ops.multi_tensor.penalties import Form
from fastreg.ops.multi_tensor.tables import table_of

from .cases import TOLERANCE, Case, random, rows
from .sass import Budget, Kernel, short_name


def penalty(name, ours, reference) -> Case:
    """Of one tensor of weights, through autograd."""

    def check(inputs, value, dvalue, grads) -> str | None:
        exact = [t.detach().double().requires_grad_() for t in inputs]
        with torch.enable_grad():
            expected = reference(*exact)
            (slope,) = torch.autograd.grad(expected, exact, dvalue.double())
        tolerance = TOLERANCE[inputs[0].dtype]
        if not torch.isclose(value.double(), expected, rtol=tolerance):
            return f"the value is {value.item():g}, not {expected.item():g}"
        if not torch.allclose(grads[0].double(), slope, rtol=tolerance, atol=1e-6 * float(slope.abs().max())):
            return "the gradient is not that of the value"
        return None

    return Case(
        name,
        random(rows),
        ours=ours,
        torch=reference,
        forward_bytes=lambda e: e,  # read p
        backward_bytes=lambda e: 2 * e,  # read p, write the gradient
        check=check,
    )


CASES = (
    penalty("l1 penalty", lambda p: penalties.l1(p, 1e-4), lambda p: 1e-4 * p.abs().sum()),
    penalty("l2 penalty", lambda p: penalties.l2(p, 1e-4), lambda p: 0.5e-4 * p.square().sum()),
    penalty(
        "elastic net penalty",
        lambda p: penalties.elastic_net(p, 1e-4, 1e-4),
        lambda p: 1e-4 * p.abs().sum() + 0.5e-4 * p.square().sum(),
    ),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles

SIZE = 1 << 27  # elements of one tensor
META = torch.device("meta")


def kernels() -> list[Kernel]:
    """Whole tiles at aligned addresses: the others are loops of no turn."""
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    found = []
    for dtype in (fp32, bf16):
        found += [
            variant("l2 value", dtype, Form(l2=1e-4), 1),
            variant("l2 gradient", dtype, Form(l2=1e-4), 2, how="write"),
            variant("l2 value, gradient added", dtype, Form(l2=1e-4), 3, how="add", headline=dtype == fp32),
            variant("elastic net value, gradient added", dtype, Form(1e-4, 1e-4), 3, how="add"),
        ]
    prior = Form(l1=1e-4, mean=1.0)
    found += [
        variant("l1 value", fp32, Form(l1=1e-4), 1),
        variant("Laplace prior, gradient added", fp32, prior, 3, how="add"),
        variant("elastic net value, gradient added", fp64, Form(1e-4, 1e-4), 3, how="add"),
    ]
    for dtype, width in ((fp32, 512), (fp32, 4096), (bf16, 4096), (fp32, 16)):
        table = table_of(META, ((0,), (SIZE,), (width,)), (width * (ops.TILE // width),))
        name = f"max-norm of rows of {width}"
        launch = ops.project_rows_launch(table, 1.0, dtype, width)
        headline = (dtype, width) == (fp32, 512)
        found += [kernel(name, launch, dtype, 2, shared_bytes=EXCHANGED, headline=headline)]
    long = ops.long_rows(META, ((0,), (SIZE,), (SIZE,)))
    squared = torch.empty(1, dtype=fp64, device=META)
    found += [
        kernel("max-norm of the tensor, second half", ops.shorten_launch(long, squared, 1.0, fp32), fp32, 2)
    ]
    return found


def variant(name, dtype, form, accesses, *, how="none", **show) -> Kernel:
    numbers = (0,), (SIZE,), (0,)
    table = table_of(META, numbers, ops.TILE)
    partials = None if how == "write" else torch.empty(table.programs, dtype=torch.float64, device=META)
    gain = torch.empty((), dtype=torch.float32, device=META) if how == "write" else None
    launch = ops.penalty_launch(table, form, (dtype, dtype), partials=partials, gain=gain, how=how)
    return kernel(name, launch, dtype, accesses, shared_bytes=SUM, **show)


SUM = 8 * ops.WARPS  # of all warps
EXCHANGED = 16384  # sums of rows
# The tables of a program: what it works on, addresses, numbers; and partial sums. Of short kernels the assembler
# unrolls the tail, and leaves a part of it outside of the loop.
SCALARS = {"narrow_loads": 18, "narrow_stores": 4}


def kernel(name, launch, dtype, accesses, *, shared_bytes=0, **show) -> Kernel:
    """accesses: how many times a weight or its gradient is read or written."""
    budget = Budget(**SCALARS, shared_bytes=shared_bytes)
    return Kernel.of(
        f"{short_name(dtype)} {name}", launch, SIZE, accesses * dtype.itemsize, trips=0, budget=budget, **show
    )
