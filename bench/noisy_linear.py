"""Noisy linear layers, a noise of its own for every example, against the plain expression of the same distribution."""

import torch
import torch.nn.functional as F

import fastreg.functional as fast
from fastreg.ops.linear import noisy_linear as ops
from fastreg.random import Stream

from .cases import TOLERANCE, Case
from .drop_connect import of_weights
from .sass import Budget, Kernel, short_name

SIGMA = 0.02


def additive(v, weight, bias):
    """As PyTorch users write it: the noise of the sums."""
    z = F.linear(v, weight, bias)
    return z + SIGMA * v.norm(dim=1, keepdim=True) * torch.randn_like(z)


def multiplicative(v, weight, bias):
    mean = F.linear(v, weight, bias)
    deviation = SIGMA * F.linear(v.square(), weight.square()).sqrt()
    return mean + deviation * torch.randn_like(mean)


def factorised(v, weight, bias):
    def factors(like):
        x = torch.randn_like(like)
        return x.sign() * x.abs().sqrt()

    mean = F.linear(v, weight, bias)
    noise = F.linear(v * factors(v), torch.full_like(weight, SIGMA))
    return mean + noise * factors(mean)


def noisy(mode: str):
    """The check of any implementation: the noise has its mean and variance, and the gradients follow it, for z - b is
    linear in the length of v: (dv, v) = (dz, z - b)."""

    def check(inputs, z, dz, grads) -> str | None:
        v, weight, bias, z, dz, dv, _, dbias = (t.detach().float() for t in (*inputs, z, dz, *grads))
        if z.shape != (len(v), len(weight)):
            return f"output is {tuple(z.shape)}"
        mean, deviation = F.linear(v, weight, bias), SIGMA * v.norm(dim=1, keepdim=True)
        if mode == "multiplicative":
            deviation = SIGMA * (v.square() @ weight.square().t()).sqrt()
        if mode == "factorised":  # two factors, each with the variance E |x| = sqrt(2 / pi)
            deviation = deviation * (2 / torch.pi) ** 0.5
        normal = (z - mean) / deviation
        # Rounding of z, which is random too. All outputs of an example share its e_in, and so a part of their variance.
        rounding = float(torch.finfo(inputs[0].dtype).eps * z.square().mean().sqrt() / deviation.mean())
        count = len(v) if mode == "factorised" else normal.numel()
        tolerance = 6 * (8 / count) ** 0.5 + 4 * rounding**2
        if abs(normal.mean()) > 6 * (2 / normal.numel()) ** 0.5 + rounding:
            return f"the mean of the noise is {normal.mean():.4f} of its deviation"
        if abs(normal.var(correction=0) - 1) > tolerance:
            return f"the variance of the noise is {normal.var():.4f} of what it should be"
        product, size = (dz * (z - bias)).sum(), (dz * (z - bias)).norm()
        if abs(product - (dv * v).sum()) > TOLERANCE[inputs[0].dtype] * (1 + 10 * size):
            return "the gradient of the input does not follow the noise"
        if not torch.allclose(dbias, dz.sum(0), rtol=1e-2, atol=1e-2 * float(dz.sum(0).abs().max())):
            return "the gradient of the bias is not the sum of dz"
        return None

    return check


def case(mode: str, plain, features: int = 4096) -> Case:
    return of_weights(
        f"noisy_linear {mode}",
        features,
        lambda v, weight, bias: fast.noisy_linear(v, weight, bias, SIGMA, mode=mode),
        plain,
        noisy(mode),
    )


CASES = (
    case("additive", additive),
    case("multiplicative", multiplicative),
    case("factorised", factorised),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles: what is behind the dense product. The others are in dual_linear.py


def kernels() -> list[Kernel]:
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found += variants(dtype, (8192, 4096), headline=dtype != torch.float16)
        found += variants(dtype, (8192, 4096), "gelu")
    return found


def variants(dtype, size, activation=None, headline=False):
    x = torch.empty(size, dtype=dtype, device="meta")
    deviation = torch.empty(size[0], dtype=torch.float32, device="meta")
    stream, e = Stream(1), dtype.itemsize
    # A B200 moves 16-bit elements in the time of 20 instructions: there issue sets the time. The backward pass moves
    # half of the bytes with as many normals.
    forward = Budget(narrow_loads=1, shared_bytes=2048, min_headroom={80: 1.2, 90: 1.1, 100: 0.6})
    backward = Budget(
        narrow_loads=1, narrow_stores=1, shared_bytes=4096, min_headroom={80: 0.6, 90: 0.6, 100: 0.3}
    )
    label = short_name(dtype) if activation is None else f"{short_name(dtype)} {activation}"
    kept = (
        None if activation is None else x
    )  # of gelu its argument, which is written and read, and dx is written
    (launch,) = ops.forward_launches(x, deviation, x, kept, stream, activation)
    moved = e * (2 if kept is None else 3)
    yield Kernel.of(f"forward {label}", launch, x.numel(), moved, budget=forward, headline=headline)
    (launch,) = ops.backward_launches(x, kept, kept, deviation, stream, activation)
    trips = size[1] // launch.arguments["BLOCK"]
    yield Kernel.of(
        f"backward {label}",
        launch,
        x.numel(),
        e * (1 if kept is None else 3),
        trips=trips,
        budget=backward,
        headline=headline,
    )
