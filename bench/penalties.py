"""Penalties with their gradients, and projections: what ``torch`` does in several passes over the weights."""

from functools import partial

import torch

from fastreg import penalties
from fastreg.ops.multi_tensor import penalties as ops
from fastreg.ops.multi_tensor.penalties import Form
from fastreg.ops.multi_tensor.tables import table_of

from .cases import TOLERANCE, Case, random, rows, twin
from .executed import absent, zeros
from .sass import Budget, Kernel, short_name


def penalty(name, ours, reference, l1=0.0, l2=0.0) -> Case:
    """A penalty on one tensor of weights, through autograd."""

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
        peers={"plain": twin(lambda kernels: lambda p: kernels.elastic_net(p, l1, l2))},
    )


CASES = (
    penalty("l1 penalty", lambda p: penalties.l1(p, 1e-4), lambda p: 1e-4 * p.abs().sum(), l1=1e-4),
    penalty("l2 penalty", lambda p: penalties.l2(p, 1e-4), lambda p: 0.5e-4 * p.square().sum(), l2=1e-4),
    penalty(
        "elastic net penalty",
        lambda p: penalties.elastic_net(p, 1e-4, 1e-4),
        lambda p: 1e-4 * p.abs().sum() + 0.5e-4 * p.square().sum(),
        l1=1e-4,
        l2=1e-4,
    ),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles

SIZE = 1 << 27  # elements of one tensor


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
        name = f"max-norm of rows of {width}"
        headline = (dtype, width) == (fp32, 512)
        launch = partial(short_rows, dtype, width)
        found += [kernel(name, launch, dtype, 2, shared_bytes=EXCHANGED, headline=headline)]
    return [*found, kernel("max-norm of the tensor, second half", partial(whole_tensor, fp32), fp32, 2)]


# Each of these returns a launch, and the tensors that its table points to.


def penalty_of(dtype, form, how, memory):
    weights, gradients = memory(SIZE, dtype=dtype), memory(SIZE, dtype=dtype)
    table = table_of(weights.device, ((weights.data_ptr(),), (SIZE,), (gradients.data_ptr(),)), ops.TILE)
    partials = None if how == "write" else memory(table.programs, dtype=torch.float64)
    gain = memory(dtype=torch.float32) if how == "write" else None
    launch = ops.penalty_launch(table, form, (dtype, dtype), partials=partials, gain=gain, how=how)
    return launch, [weights, gradients]


def short_rows(dtype, width, memory):
    weights = memory(SIZE, dtype=dtype)
    numbers = (weights.data_ptr(),), (SIZE,), (width,)
    table = table_of(weights.device, numbers, (width * (ops.TILE // width),))
    return ops.project_rows_launch(table, OUTSIDE, dtype, width), [weights]


def whole_tensor(dtype, memory):
    weights = memory(SIZE, dtype=dtype)
    long = ops.long_rows(weights.device, ((weights.data_ptr(),), (SIZE,), (SIZE,)))
    squared = memory(1, dtype=torch.float64).fill_(4.0)
    return ops.shorten_launch(long, squared, 1.0, dtype), [weights]


OUTSIDE = -1.0  # a radius that no row is inside of: all are written


def variant(name, dtype, form, accesses, *, how="none", **show) -> Kernel:
    return kernel(name, partial(penalty_of, dtype, form, how), dtype, accesses, shared_bytes=SUM, **show)


SUM = 8 * ops.WARPS  # of all warps
EXCHANGED = 16384  # sums of rows
# The tables of a program: what it works on, addresses, numbers; and partial sums. The assembler unrolls the
# tail of short kernels, and leaves a part of it outside of the loop.
SCALARS = {"narrow_loads": 18, "narrow_stores": 4}


def kernel(name, launch, dtype, accesses, *, shared_bytes=0, **show) -> Kernel:
    """accesses: how many times a weight or its gradient is read or written."""
    budget = Budget(**SCALARS, shared_bytes=shared_bytes)
    declared, _ = launch(absent)
    show |= {"trips": 0, "budget": budget, "real": partial(launch, zeros)}
    return Kernel.of(f"{short_name(dtype)} {name}", declared, SIZE, accesses * dtype.itemsize, **show)
