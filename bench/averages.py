"""Averages and snapshots of weights."""

import torch
from torch.optim import swa_utils

from fastreg.averages import get_ema_multi_avg_fn
from fastreg.ops.multi_tensor import averages as ops
from fastreg.ops.multi_tensor.tables import table_of

from .cases import Case
from .optimizers import Stepped, large, stepped, tiny
from .sass import Budget, Kernel, short_name

DECAY = 0.9


def following(make) -> Stepped:
    """A function of averages and weights, which come as parameters and their gradients."""

    def build(averages):
        with torch.no_grad():
            update = make(DECAY)
        pairs = [p.detach() for p in averages], [p.grad for p in averages]
        return lambda: update(*pairs, 1)

    return Stepped(build)


def average(name: str, inputs) -> Case:
    return Case(
        name,
        inputs,
        ours=following(get_ema_multi_avg_fn),
        torch=following(swa_utils.get_ema_multi_avg_fn),
        forward_bytes=lambda e: 3 * e,  # read the average and the weight, write the average
        backward_bytes=lambda e: 0,
        check=stepped(lambda average, p: average + (1 - DECAY) * (p - average)),
        compiled=lambda mode: following(
            lambda decay: torch.compile(swa_utils.get_ema_multi_avg_fn(decay), mode=mode, dynamic=False)
        ),
    )


CASES = (average("moving average", large), average("moving average, tensors of 64", tiny))

# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles

SIZE = 1 << 27  # elements, or bytes, of one tensor
META = torch.device("meta")
# The tables of a program: what it works on, and addresses. Of short kernels the assembler unrolls the tail, and leaves
# a part of it outside of the loop.
SCALARS = {"narrow_loads": 18, "narrow_stores": 4}


def kernels() -> list[Kernel]:
    """Whole tiles at aligned addresses: the others are loops of no turn."""
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    numbers = (0,), (SIZE,), (0,)
    found = []
    for average, dtype in ((fp32, fp32), (fp32, bf16), (bf16, bf16), (fp64, fp64)):
        launch = ops.follow_launch(table_of(META, numbers, ops.TILE), 0.001, (average, dtype))
        found += [
            Kernel.of(
                f"moving average {short_name(average)} of {short_name(dtype)}",
                launch,
                SIZE,
                2 * average.itemsize + dtype.itemsize,
                trips=0,
                # Accesses of 16 bytes are four elements a thread to one type and eight to the other.
                budget=Budget(**SCALARS, shared_bytes=16384 if average != dtype else 0),
                headline=average == dtype == fp32,
            )
        ]
    table = table_of(META, numbers, ops.BYTES)
    for name, flag in (("copy", None), ("copy if improved", torch.empty((), dtype=torch.bool, device=META))):
        launch = ops.copy_if_launch(table, flag)
        budget = Budget(**SCALARS)
        found += [Kernel.of(f"{name}, a byte", launch, SIZE, 2, trips=0, budget=budget)]
    return found
