"""Averages and snapshots of weights."""

from functools import partial

import torch
from torch.optim import swa_utils

from fastreg.averages import get_ema_multi_avg_fn
from fastreg.ops.multi_tensor import averages as ops
from fastreg.ops.multi_tensor.tables import table_of

from .cases import Case
from .executed import absent, zeros
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
        peers={"plain": lambda: following(plain_average)},
    )


def plain_average(decay: float):
    """The plain kernel, launched for each tensor."""
    from .plain import follow_

    def update(averages, current, _):
        for a, p in zip(averages, current, strict=True):
            follow_(a, p, decay)

    return update


CASES = (average("moving average", large), average("moving average, tensors of 64", tiny))

# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles

SIZE = 1 << 27  # elements, or bytes, of one tensor
# The tables of a program: what it works on, and addresses. The assembler unrolls the tail of short kernels, and
# leaves a part of it outside of the loop.
SCALARS = {"narrow_loads": 18, "narrow_stores": 4}


def kernels() -> list[Kernel]:
    """Whole tiles at aligned addresses: the others are loops of no turn."""
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    found = []
    for average, dtype in ((fp32, fp32), (fp32, bf16), (bf16, bf16), (fp64, fp64)):
        launch = partial(following_of, average, dtype)
        found += [
            Kernel.of(
                f"moving average {short_name(average)} of {short_name(dtype)}",
                launch(absent)[0],
                SIZE,
                2 * average.itemsize + dtype.itemsize,
                trips=0,
                # Accesses of 16 bytes are four elements a thread to one type and eight to the other.
                # Loads of fp32 then have lanes 32 bytes apart: two requests ask for the same sectors.
                budget=Budget(
                    **SCALARS,
                    shared_bytes=16384 if average != dtype else 0,
                    sectors=1.39 if average != dtype else 1,
                ),
                headline=average == dtype == fp32,
                real=partial(launch, zeros),
            )
        ]
    for name, improved in (("copy", False), ("copy if improved", True)):
        launch = partial(copy_of, improved)
        rest = {"trips": 0, "budget": Budget(**SCALARS), "real": partial(launch, zeros)}
        found += [Kernel.of(f"{name}, a byte", launch(absent)[0], SIZE, 2, **rest)]
    return found


# Each of these returns a launch, and the tensors that its table points to.


def following_of(average, dtype, memory):
    averages, weights = memory(SIZE, dtype=average), memory(SIZE, dtype=dtype)
    return ops.follow_launch(tables(averages, weights, ops.TILE), 0.001, (average, dtype)), [
        averages,
        weights,
    ]


def copy_of(improved, memory):
    target, source = memory(SIZE, dtype=torch.uint8), memory(SIZE, dtype=torch.uint8)
    flag = memory(dtype=torch.bool).fill_(True) if improved else None
    return ops.copy_if_launch(tables(target, source, ops.BYTES), flag), [target, source]


def tables(target, source, tile):
    return table_of(target.device, ((target.data_ptr(),), (SIZE,), (source.data_ptr(),)), tile)
