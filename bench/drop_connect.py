"""DropConnect with a mask of its own for every example, or one for all. ``p`` is the probability of dropping."""

from functools import partial

import torch
import torch.nn.functional as F

import fastreg.functional as fast
from fastreg import random as streams
from fastreg.ops.fused import needs_argument
from fastreg.ops.linear import drop_connect as ops
from fastreg.ops.linear import expectation
from fastreg.random import Stream

from .cases import TOLERANCE, Case, rows, twin
from .sass import Budget, Kernel, short_name


def inputs(features: int):
    """v [examples, features], W [features, features] with rows of norm 1, a bias. On a CPU, which only shows that it
    runs, 64 features."""

    def make(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        outputs = 64 if device.type == "cpu" else features
        examples, columns = rows(numel, outputs)
        v = torch.randn(examples, columns, dtype=dtype, device=device)
        weight = (torch.randn(outputs, columns, dtype=torch.float32, device=device) / columns**0.5).to(dtype)
        bias = torch.randn(outputs, dtype=dtype, device=device)
        return tuple(t.requires_grad_() for t in (v, weight, bias))

    return make


def all_masks_at_once(p: float):
    """What PyTorch users write: the mask in memory, a product of matrices for every example."""

    def drop_connect(v, weight, bias):
        mask = torch.rand(len(v), *weight.shape, device=v.device, dtype=v.dtype) >= p
        masked = torch.where(mask, weight, 0) / (1 - p)
        return torch.bmm(masked, v.unsqueeze(2)).squeeze(2) + bias

    return drop_connect


def has_the_moments(p: float):
    """The check of any implementation: mean and variance are those of the paper, and the gradients follow the mask,
    for z - b is linear in v and in W: (dz, z - b) = (dv, v) = (dW, W)."""

    def check(inputs, z, dz, grads) -> str | None:
        v, weight, bias, z, dz, dv, dweight, dbias = (t.detach().float() for t in (*inputs, z, dz, *grads))
        if z.shape != (len(v), len(weight)):
            return f"output is {tuple(z.shape)}"
        deviation = (p / (1 - p) * v.square() @ weight.square().t()).sqrt()
        normal = (z - bias - v @ weight.t()) / deviation
        tolerance = TOLERANCE[inputs[0].dtype] + 6 * (2 / normal.numel()) ** 0.5
        if abs(normal.mean()) > tolerance or abs(normal.var(correction=0) - 1) > 2 * tolerance:
            return f"mean {normal.mean():.4f} and variance {normal.var():.4f} of z, in place of 0 and 1"
        product, size = (dz * (z - bias)).sum(), (dz * (z - bias)).norm()
        for name, other in (("input", (dv * v).sum()), ("weight", (dweight * weight).sum())):
            if abs(product - other) > TOLERANCE[inputs[0].dtype] * (1 + 10 * size):
                return f"the gradient of the {name} does not follow the mask"
        if not torch.allclose(dbias, dz.sum(0), rtol=1e-2, atol=1e-2 * float(dz.sum(0).abs().max())):
            return "the gradient of the bias is not the sum of dz"
        return None

    return check


def dropped_weights(p: float):
    """A masked copy of the weights and a dense product. At p = 1/2 alone, where masks that all share leave the mean
    square of z what it is with own ones."""

    def drop_connect(v, weight, bias):
        return F.linear(v, F.dropout(weight, p), bias)

    return drop_connect


def two_products(p: float):
    """The Gaussian with the mean and variance over masks."""

    def drop_connect(v, weight, bias):
        mean = F.linear(v, weight, bias)
        variance = p / (1 - p) * F.linear(v.square(), weight.square())
        return mean + variance.sqrt() * torch.randn_like(mean)

    return drop_connect


def flipped(v, weight, bias):
    """Flipout at p = 1/2, with signs from memory."""

    def signs(like):
        return torch.randint(2, like.shape, device=like.device, dtype=like.dtype) * 2 - 1

    mean = F.linear(v, weight, bias)
    return mean + F.linear(v * signs(v), weight * signs(weight)) * signs(mean)


def of_weights(name: str, features: int, ours, plain, check, peers=None) -> Case:
    """A case of a linear layer with something random in its weights."""
    return Case(
        f"{name} {features}x{features}",
        inputs(features),
        ours=ours,
        torch=plain,
        # v and z, dz, v and dv. What the weights add is little, and what takes the time is no byte.
        forward_bytes=lambda e: 2 * e,
        backward_bytes=lambda e: 3 * e,
        check=check,
        peers=peers or {},
    )


def case(features: int, p: float, plain, mode: str = "example") -> Case:
    form = "" if mode == "example" else f' mode="{mode}"'
    return of_weights(
        f"drop_connect_linear{form} p={p:g}",
        features,
        lambda v, weight, bias: fast.drop_connect_linear(v, weight, bias, p, mode=mode),
        plain,
        has_the_moments(p),
        {"plain": twin(lambda kernels: partial(kernels.drop_connect_linear, p=p))}
        if mode == "example"
        else None,
    )


CASES = (
    case(1024, 0.5, all_masks_at_once(0.5)),
    case(1024, 0.25, all_masks_at_once(0.25)),
    case(4096, 0.5, all_masks_at_once(0.5)),
    case(4096, 0.5, dropped_weights(0.5), "batch"),
    case(4096, 0.5, flipped, "flipout"),
    case(4096, 0.25, two_products(0.25), "gaussian"),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles. An element is a connection: an example, an output and an input


def kernels() -> list[Kernel]:
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found += variants(dtype, (256, 4096, 4096), 0.5, headline=dtype == torch.bfloat16)
    found += variants(torch.bfloat16, (256, 4096, 4096), 0.25)
    found += variants(torch.bfloat16, (256, 4096, 4096), 0.3)
    found += variants(torch.bfloat16, (128, 1024, 1024), 0.5, activation="relu", note=" split")
    for activation in (
        "relu",
        "gelu",
    ):  # in training; the pass of their derivatives is dropout's, without a mask
        found.append(next(variants(torch.bfloat16, (256, 4096, 4096), 0.5, activation, f" {activation}")))
    for dtype in (torch.bfloat16, torch.float32):
        found += shared_variants(dtype, 128, 128)
    found += shared_variants(torch.bfloat16, 512, 512)
    found += shared_variants(torch.bfloat16, 256, 32)
    for dtype, p in ((torch.bfloat16, 0.5), (torch.bfloat16, 0.3), (torch.float32, 0.5)):
        found.append(masking(dtype, p))
    for activation in ("sigmoid", "tanh"):
        found += [*inference(activation), *inference(activation, 1000)]
    return found


# Instructions a connection at one binary digit, and a digit more: forward and input gradient, weight gradient.
BUDGETS = {2: (3.1, 3.7, 0.31), 4: (9.0, 3.7, 0.31)}


def variants(dtype, size, p, activation=None, note="", headline=False):
    examples, outputs, inputs = size
    v, weight, z, bias = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((examples, inputs), (outputs, inputs), (examples, outputs), (outputs,))
    )
    chance = streams.chance(p)
    form = ops.Form(*chance, 1, 1 / chance.probability, activation)
    connections = examples * outputs * inputs
    moved = dtype.itemsize * (v.numel() + weight.numel() + z.numel()) / connections
    label = short_name(dtype)
    product, gradient, digit = BUDGETS[dtype.itemsize]
    product, gradient = (limit + digit * (chance.digits - 1) for limit in (product, gradient))

    def kernel(name, launch, trips, limit, shared):
        # Bound by the issue of instructions, by construction: no headroom is asked for.
        budget = Budget(
            max_instructions=limit,
            narrow_loads=200,
            narrow_stores=200,
            shared_bytes=shared,
            min_headroom=0,
        )
        return Kernel.of(
            f"{name} {label} p={p:g}{note}",
            launch,
            connections,
            moved,
            trips=trips,
            budget=budget,
            headline=headline,
        )

    stream, three = Stream(1), dtype == torch.float32

    def trips(launch):
        """Tiles of columns, and the examples of a lane, four at a time; then the repair of what is NaN, which is not
        counted. sm_100 also waits for its tensor cores."""
        loops = (launch.leaves["shape.trips"], 4, 0, 0)
        waits = 12 if launch.leaves["plan.three"] else 4
        return {80: loops, 90: loops, 100: (1, *loops, *[1] * waits)}

    before = z if needs_argument(activation) else None
    forward = ops.product_launches(v, weight, bias, z, before, stream, form, False, three)[0]
    backward = ops.product_launches(z, weight, None, v, None, stream, form, True, three)[0]
    yield kernel("forward", forward, trips(forward), product, 24576)
    yield kernel("input gradient", backward, trips(backward), product, 24576)
    (of_weights,) = ops.weight_gradient_launches(z, v, weight, stream, form, three)
    yield kernel("weight gradient", of_weights, of_weights.arguments["words"], gradient, 8192)


# The same of a mask that 16 examples and more share, by the examples of a group: a weight costs about 9 instructions a
# tile of examples in the products, and as many a group in its gradient.
SHARED_BUDGETS = {32: (0.4, 0.75), 128: (0.11, 0.3), 512: (0.1, 0.14)}


def shared_variants(dtype, examples, group_size):
    outputs = inputs = 4096
    v, weight, z = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((examples, inputs), (outputs, inputs), (examples, outputs))
    )
    form = ops.Form(*streams.chance(0.5), group_size, 2.0)
    connections = examples * outputs * inputs
    moved = dtype.itemsize * (v.numel() + weight.numel() + z.numel()) / connections
    stream = Stream(1)
    wide = dtype == torch.float32
    limits = SHARED_BUDGETS[group_size]

    def kernel(name, launch, loops, waits, limit, **exceptions):
        budget = Budget(
            max_instructions=2.4 * limit if wide else limit, shared_bytes=98304, min_headroom=0, **exceptions
        )
        label = f"shared {name} {short_name(dtype)} {examples} in groups of {group_size}"
        loops = {80: loops, 90: loops, 100: (1, *loops, *[1] * waits)}
        return Kernel.of(label, launch, connections, moved, trips=loops, budget=budget)

    forward = ops.product_launches(v, weight, None, z, None, stream, form, False, wide)[0]
    backward = ops.product_launches(z, weight, None, v, None, stream, form, True, wide)[0]
    for name, launch in (("forward", forward), ("input gradient", backward)):
        repair = (0, 0) if wide else ()
        yield kernel(name, launch, (launch.leaves["shape.trips"], *repair), 6 if wide else 2, limits[0])
    if not wide:  # ATen's product and a pass of masking, for one group
        (launch,) = ops.weight_gradient_launches(z, v, weight, stream, form, wide)
        chunks = -(-group_size // launch.leaves["plan.examples"])
        loops = (chunks,) if group_size == examples else (examples // group_size, chunks)
        yield kernel("weight gradient", launch, loops, 2, limits[1])


def masking(dtype, p):
    """An element is one of W: one pass over it."""
    weight = torch.empty(4096, 4096, dtype=dtype, device="meta")
    chance = streams.chance(p)
    (launch,) = ops.mask_launches(weight, weight, 0, Stream(1), ops.Form(*chance, ops.BATCH, 2.0))
    budget = Budget(
        max_instructions=14 + 5 * (chance.digits - 1) if dtype.itemsize == 2 else 18,
        shared_bytes=0 if dtype.itemsize == 2 else 2048,  # a thread draws for 8 neighbours and stores 4
        min_headroom=1
        if chance.digits == 1
        else 0,  # the random numbers of 8 digits take longer than the memory
    )
    label = f"mask weights {short_name(dtype)} p={p:g}"
    return Kernel.of(label, launch, weight.numel(), 2 * dtype.itemsize, budget=budget)


def inference(activation, samples=0):
    """An element is a term: inference at (256, 4096), by nodes or over draws."""
    tensors = [torch.empty(256, 4096, device="meta") for _ in range(5)]
    mean, deviation, y, dmean, ddeviation = tensors
    stream, how = Stream(1), f"Z={samples}" if samples else "nodes"
    terms = samples or expectation.NODES
    rest = stream, activation, samples
    (forward,) = expectation.average_launches(mean, deviation, y, *rest)
    (backward,) = expectation.gradient_launches(y, mean, deviation, dmean, ddeviation, *rest)
    limits = (35, 37) if samples else (16, 20)
    for name, launch, moved, limit in (
        ("inference", forward, 3, limits[0]),
        ("its gradient", backward, 5, limits[1]),
    ):
        yield Kernel.of(
            f"{name} {activation} fp32 {how}",
            launch,
            mean.numel() * terms,
            moved * 4 / terms,
            trips=launch.arguments.get("quads", ()),
            # Arithmetic is the point: an element a thread, whose accesses are narrow.
            budget=Budget(max_instructions=limit, narrow_loads=3, narrow_stores=2, min_headroom=0),
        )
