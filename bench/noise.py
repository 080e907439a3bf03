"""Gaussian noise on a batch of hidden states: one pass, where torch makes the noise in memory first."""

import math

import torch

import fastreg.functional as fast
from fastreg.ops import noise as ops
from fastreg.random import Stream

from .cases import TOLERANCE, Case, random, rows, twin
from .sass import Budget, Kernel, short_name


def additive(std: float) -> Case:
    return Case(
        f"gaussian_noise additive std={std:g}",
        random(rows),
        ours=lambda x: fast.gaussian_noise(x, std),
        torch=lambda x: x + std * torch.randn_like(x),
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 0,  # the gradient is dy itself, by reference
        check=noisy(std, multiplicative=False),
        peers={"plain": twin(lambda kernels: lambda x: kernels.gaussian_noise(x, std))},
    )


def multiplicative(std: float) -> Case:
    return Case(
        f"gaussian_noise multiplicative std={std:g}",
        random(rows),
        ours=lambda x: fast.gaussian_noise(x, std, mode="multiplicative"),
        torch=lambda x: x * (1 + std * torch.randn_like(x)),
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 2 * e,  # read dy, write dx; the noise is drawn again from its seed
        check=noisy(std, multiplicative=True),
        peers={"plain": twin(lambda kernels: lambda x: kernels.gaussian_noise(x, std, "multiplicative"))},
    )


def noisy(std: float, *, multiplicative: bool):
    """The check of noise: what it added has the moments of a normal, is new everywhere, and the gradient follows it.

    Looks at both ends of the input, 2^19 elements each. Elements near zero, of which rounding hides the
    factor, are left out of the multiplicative one.
    """

    def check(inputs, y, dy, grads) -> str | None:
        x, tolerance = inputs[0], TOLERANCE[inputs[0].dtype]
        if y.shape != x.shape or y.dtype != x.dtype:
            return f"output is {tuple(y.shape)} {y.dtype}, input {tuple(x.shape)} {x.dtype}"
        count = min(x.numel() // 2, 1 << 19)

        def ends(t):
            flat = t.detach().flatten()
            return torch.stack((flat[:count], flat[len(flat) - count :])).double()

        x, y, dy, dx = ends(x), ends(y), ends(dy), ends(grads[0])
        factor = y / x if multiplicative else torch.ones_like(x)
        known = x.abs() > 1e-2 if multiplicative else torch.ones_like(x, dtype=torch.bool)
        if not torch.isclose(dx, dy * factor, rtol=4 * tolerance, atol=tolerance)[known].all():
            return "the gradient does not follow the noise of the forward pass"

        eps = (factor - 1 if multiplicative else y - x) / std
        neighbours = (eps[:, 1:] * eps[:, :-1])[known[:, 1:] & known[:, :-1]]
        both_ends = (eps[0] * eps[1])[known[0] & known[1]]
        eps = eps[known]
        for name, sample, expected, variance in (
            ("mean", eps, 0, 1),
            ("variance", eps**2, 1, 2),
            ("fourth moment", eps**4, 3, 96),
            ("correlation of neighbours", neighbours, 0, 1),
            ("correlation of both ends", both_ends, 0, 1),
        ):
            found = float(sample.mean())
            # 6 standard errors (one false alarm in 10^9), plus what rounding y adds to the noise.
            if abs(found - expected) > 6 * math.sqrt(variance / len(sample)) + tolerance * max(1, expected):
                return f"{name} of the noise is {found:.4f} over {len(sample)} elements, not {expected}"
        return None

    return check


CASES = (additive(0.1), multiplicative(0.5))


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles


def kernels() -> list[Kernel]:
    """Both forms at sizes of training. The gradient of the multiplicative form is the same kernel."""
    tokens = (8192, 4096)
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        show = {"headline": dtype != torch.float16}
        found += [variant(dtype, "additive", tokens, **show)]
        found += [variant(dtype, "multiplicative", tokens, **show)]
    for dtype in (torch.bfloat16, torch.float32):
        found += [variant(dtype, "additive, seed in memory", tokens, seed_in_memory=True)]
        found += [variant(dtype, "additive, 2^32 elements", (1 << 16, 1 << 16))]
        found += [variant(dtype, "additive, small", (128, 784), budget=ODD)]
        found += [variant(dtype, "additive, ragged", (8191, 4097), budget=ODD)]
    return found


def variant(dtype, name, size, *, seed_in_memory=False, budget=None, **show) -> Kernel:
    x = torch.empty(size, dtype=dtype, device="meta")
    stream = Stream(torch.empty(1, dtype=torch.int64, device="meta") if seed_in_memory else 1)
    (launch,) = ops.launches(x, x, stream, ops.Form(0.1, name == "multiplicative"))
    label = short_name(dtype)
    return Kernel.of(
        f"{label} {name}",
        launch,
        x.numel(),
        2 * dtype.itemsize,  # x, y
        budget=budget or budget_of(dtype, seed_in_memory),
        **show,
    )


# Small tensors take tiles of 1,024, which share the key schedule among fewer elements; the elements behind the last
# whole vector are counted for every program, and one runs them.
ODD = Budget(narrow_loads=1, narrow_stores=1, min_headroom=0.7)


def budget_of(dtype, seed_in_memory) -> Budget:
    if dtype.itemsize == 4:
        return Budget(max_instructions=22, narrow_loads=seed_in_memory, min_headroom={80: 3, 90: 3, 100: 1.8})
    # A B200 moves 16-bit elements in the time of 20 instructions: there, and there alone, issue sets the time.
    return Budget(
        max_instructions=23.5, narrow_loads=seed_in_memory, min_headroom={80: 1.4, 90: 1.6, 100: 0.85}
    )
