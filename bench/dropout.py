"""Dropout and its relatives, as they stand in training code. ``p`` is the probability of dropping."""

import math

import torch
import torch.nn.functional as torch_functional

import fastreg.functional as fast
from fastreg.ops import dropout as ops
from fastreg.ops.layout import tiling
from fastreg.random import Stream

from .cases import Case, images, masked, random, rows, twin, width
from .sass import Budget, Kernel, bytes_of, short_name


def zeros(x, *_):
    return torch.zeros_like(x)


def samples(numel):
    """A batch of a vision transformer's activations, one row a sample of 64 tokens · 768."""
    return rows(numel, 64 * 768)


def attorch(layer: str, **arguments):
    """attorch fuses dropout into its activation layers (``drop_p``) and has it alone."""

    def build():
        import attorch

        return getattr(attorch, layer)(**arguments).train()

    return build


def transformer_engine(p):
    def build():
        from transformer_engine.pytorch.ops import Dropout

        return Dropout(p)

    return build


def plain(p: float) -> Case:
    return Case(
        f"dropout p={p:g}",
        random(rows),
        ours=lambda x: fast.dropout(x, p),
        torch=lambda x: torch_functional.dropout(x, p),
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 2 * e,  # read dy, write dx; the mask is drawn again from its seed
        check=masked(p, lambda x: x / (1 - p), zeros),
        peers={
            "plain": twin(lambda kernels: lambda x: kernels.dropout(x, p)),
            "attorch": attorch("Dropout", p=p),
            "transformer_engine": transformer_engine(p),
        },
    )


def relu(p: float) -> Case:
    return Case(
        f"relu+dropout p={p:g}",
        random(rows),
        ours=lambda x: fast.dropout(x, p, activation="relu"),
        torch=lambda x: torch_functional.dropout(x.relu(), p),
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 3 * e,  # read dy and x (or y) for the sign, write dx
        check=masked(p, lambda x: x.relu() / (1 - p), zeros),
        peers={"attorch": attorch("ReLU", drop_p=p)},
    )


def bias_gelu(p: float) -> Case:
    return Case(
        f"bias+gelu+dropout p={p:g}",
        random(rows, width),
        ours=lambda x, b: fast.dropout(x, p, bias=b, activation="gelu"),
        torch=lambda x, b: torch_functional.dropout(torch_functional.gelu(x + b), p),
        forward_bytes=lambda e: 2 * e,  # read x, write y; the bias is one row
        backward_bytes=lambda e: 3 * e,  # read dy and x, write dx; the bias gradient is one row
        check=masked(p, lambda x, b: torch_functional.gelu(x + b) / (1 - p), zeros),
    )


def bias_residual(p: float) -> Case:
    """The end of each half of a transformer layer (Megatron's bias_dropout_add)."""

    def megatron():
        from transformer_engine.pytorch.jit import bias_dropout_add_fused_train

        return lambda x, b, r: bias_dropout_add_fused_train(x, b, r, p)

    return Case(
        f"bias+dropout+residual p={p:g}",
        random(rows, width, rows),
        ours=lambda x, b, r: fast.dropout(x, p, bias=b, residual=r),
        torch=lambda x, b, r: torch_functional.dropout(x + b, p) + r,
        forward_bytes=lambda e: 3 * e,  # read x and the residual, write y
        backward_bytes=lambda e: 2 * e,  # read dy, write dx; the residual's gradient is dy itself
        check=masked(p, lambda x, b, r: (x + b) / (1 - p) + r, lambda x, b, r: r * 1),
        peers={"transformer_engine": megatron},
    )


def channel(p: float, layout: str) -> Case:
    return Case(
        f"dropout2d {layout} p={p:g}",
        random(images, channels_last=layout == "NHWC"),
        ours=lambda x: fast.dropout2d(x, p),
        torch=lambda x: torch_functional.dropout2d(x, p),
        # A dropped plane need not be read: e·(1−p) in, e out. In channels_last a 32-byte sector of memory
        # holds several channels and nearly always a kept one, so there every byte is read.
        forward_bytes=lambda e: e * (1 - p) + e if layout == "NCHW" else 2 * e,
        backward_bytes=lambda e: e * (1 - p) + e if layout == "NCHW" else 2 * e,
        check=masked(p, lambda x: x / (1 - p), zeros, unit=2),
    )


def drop_path(p: float) -> Case:
    def eager(x, r):  # timm's formula, with the addition that follows it
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - p).div_(1 - p)
        return x * mask + r

    return Case(
        f"drop_path+residual p={p:g}",
        random(samples, samples),
        ours=lambda x, r: fast.drop_path(x, p, residual=r),
        torch=eager,
        forward_bytes=lambda e: e * (1 - p) + 2 * e,  # read the kept samples and the residual, write y
        backward_bytes=lambda e: (
            e * (1 - p) + e
        ),  # read dy of the kept samples, write dx; the rest is by reference
        check=masked(p, lambda x, r: x / (1 - p) + r, lambda x, r: r * 1, unit=1),
    )


def alpha(p: float) -> Case:
    negative = 1.7580993408473766  # −(value at which SELU saturates); Klambauer et al. 2017
    a = 1 / math.sqrt((negative**2 * p + 1) * (1 - p))
    return Case(
        f"alpha_dropout p={p:g}",
        random(rows),
        ours=lambda x: fast.alpha_dropout(x, p, training=True),
        torch=lambda x: torch_functional.alpha_dropout(x, p, training=True),
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 2 * e,  # read dy, write dx
        check=masked(
            p,
            lambda x: a * x + a * negative * p,
            lambda x: torch.full_like(x, a * negative * (p - 1)),
        ),
    )


CASES = (
    plain(0.1),
    plain(0.5),
    bias_gelu(0.1),
    bias_residual(0.1),
    relu(0.5),
    channel(0.5, "NCHW"),
    channel(0.5, "NHWC"),
    drop_path(0.1),
    alpha(0.1),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles: the launches of the public functions, on tensors without data


def kernels() -> list[Kernel]:
    """Every form at sizes of training, as forward and backward launch it."""
    tokens = {"size": (8192, 4096)}  # dim 1 is the features
    planes = {"size": (32, 256, 64, 64)}
    planes_last = planes | {"memory_format": torch.channels_last}
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        plain = 16 if dtype.itemsize == 2 else 20
        show = {"headline": dtype != torch.float16}
        found += variants(dtype, "plain", tokens, max_instructions=plain, **show)
        found += variants(dtype, "bias+gelu", tokens, bias_dim=1, activation="gelu", **show)
        found += variants(dtype, "bias+residual", tokens, bias_dim=1, residual=True, **show)
        found += variants(dtype, "bias+gelu+residual", tokens, bias_dim=1, activation="gelu", residual=True)
    for dtype in (torch.bfloat16, torch.float32):
        for activation in ops.ACTIVATIONS:
            found += variants(dtype, activation, tokens, activation=activation)
        found += variants(dtype, "alpha", tokens, alpha=True)
        found += variants(dtype, "plain, seed in memory", tokens, seed_in_memory=True)
        found += variants(dtype, "plain, 2^32 elements", {"size": (1 << 16, 1 << 16)})
        # Odd sizes: elements behind the last whole vector, and rows that no vector divides.
        found += variants(dtype, "plain, ragged", {"size": (8191, 4097)}, budget=ODD)
        found += variants(
            dtype, "bias+relu, ragged", {"size": (8192, 4097)}, bias_dim=1, activation="relu", budget=ODD
        )
        found += variants(dtype, "bias+relu NCHW", planes, bias_dim=1, activation="relu")
        found += variants(dtype, "bias+relu NHWC", planes_last, bias_dim=1, activation="relu")
        found += variants(dtype, "channels NCHW", planes, mask_dims=2)
        found += variants(dtype, "channels NHWC", planes_last, mask_dims=2)
        found += variants(dtype, "samples+residual", planes, mask_dims=1, residual=True)
    return found


def variants(
    dtype,
    name,
    layout,
    *,
    residual=False,
    seed_in_memory=False,
    alpha=False,
    max_instructions=None,
    budget=None,
    headline=False,
    **form,
):
    """The forward and the backward kernel of one form at p = 0.1."""
    x = torch.empty(dtype=dtype, device="meta", **layout)
    form = ops.form_for(0.1, alpha=alpha)._replace(**form)
    stream = Stream(torch.empty(1, dtype=torch.int64, device="meta") if seed_in_memory else 1)
    bias = None if form.bias_dim is None else x.new_empty(x.shape[form.bias_dim])
    kept = x if form.keeps_input else None
    tiles = tiling(ops.tiled(x, form), form.mask_dims, form.bias_dim)
    e = dtype.itemsize
    read = e * 0.9 if tiles.mask == "row" else e  # what a mask of rows drops is not read
    label = short_name(dtype)

    (forward,) = ops.forward_launches(x, bias, x if residual else None, x, stream, form)
    yield Kernel.of(
        f"forward {label} {name}",
        forward,
        x.numel(),
        read + e * (2 if residual else 1),  # x, the residual, y
        budget=budget or budget_of(dtype, tiles, form, seed_in_memory, max_instructions),
        headline=headline,
    )
    backward, *_ = ops.backward_launches(x, kept, bias if kept is not None else None, x, stream, form, bias)
    looped = backward.arguments["tensors"].partial is not None and tiles.bias == "columns"
    yield Kernel.of(
        f"backward {label} {name}",
        backward,
        x.numel(),
        read * (1 if kept is None else 2)
        + e
        + bytes_of(backward, "tensors.partial") / x.numel(),  # dy, x, dx
        trips=tiles.rows / backward.arguments["plan"].rows / backward.grid[1] if looped else (),
        budget=budget or budget_of(dtype, tiles, form, seed_in_memory, max_instructions),
        headline=headline,
    )


ODD = Budget(
    narrow_loads=1000, narrow_stores=1000, shared_bytes=8192, sectors=1.45, min_headroom=0
)  # no spills


def budget_of(dtype, tiles, form, seed_in_memory, max_instructions) -> Budget:
    return Budget(
        max_instructions=max_instructions,
        narrow_loads=seed_in_memory + (8 if tiles.bias else 0),  # a bias, shared by many elements
        narrow_stores=8 if tiles.bias else 0,
        shared_bytes=8192 if tiles.bias else 0,
        # A B200 reads a bf16 element in the time of 20 instructions: the dearest activations take a little more.
        # Triton 3.6 spends an instruction more than 3.9 on fp16 bias+gelu, which leaves it at 1.49 on an H100.
        min_headroom={
            80: 1,
            90: 1.48 if dtype == torch.float16 else 1.5,
            100: 1 if form.activation is None else 0.8,
        },
    )
