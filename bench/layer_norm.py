"""Layer normalization, and the seam between two blocks of a transformer: dropout + add + layer normalization."""

from functools import partial

import torch
import torch.nn.functional as torch_functional

import fastreg.functional as fast
from fastreg.ops.norms import layer_norm as ops
from fastreg.ops.partial_sums import sum_launch
from fastreg.random import Stream

from .cases import TOLERANCE, Case, close_to, random, rows, twin
from .sass import Budget, Kernel, bytes_of, short_name

EPS = 1e-5


def width(numel, features):
    return rows(numel, features)[1:]


def shapes(features: int, activations: int):
    """``inputs``: so many [tokens, features], a weight and a bias."""
    wide, narrow = partial(rows, features=features), partial(width, features=features)
    return random(*[wide] * activations, narrow, narrow)


def layer_norm(x, weight, bias):
    return torch_functional.layer_norm(x, weight.shape, weight, bias, EPS)


# -----------------------------------------------------------------------------------------------------------
# Who else has it


def liger():
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, w, b: liger_layer_norm(x, w, b, EPS)


def apex():
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, w, b: fused_layer_norm_affine(x, w, b, tuple(w.shape), EPS)


def flash_attention(p: float | None = None):
    """p: None for layer normalization alone."""

    def build():
        from flash_attn.ops.triton.layer_norm import layer_norm_fn

        if p is None:
            return lambda x, w, b: layer_norm_fn(x, w, b, eps=EPS)
        return lambda x, r, w, b: layer_norm_fn(x, w, b, residual=r, eps=EPS, dropout_p=p)

    return build


# -----------------------------------------------------------------------------------------------------------
# What is timed


def plain(features: int) -> Case:
    return Case(
        f"layer_norm C={features}",
        shapes(features, 1),
        ours=lambda x, w, b: fast.layer_norm(x, w.shape, w, b, EPS),
        torch=layer_norm,
        forward_bytes=lambda e: 2 * e,  # read x, write y; weight and bias are one row
        backward_bytes=lambda e: (
            3 * e
        ),  # read dy and x, write dx; the gradients of weight and bias are one row
        check=close_to(layer_norm, rowwise=True),
        peers={
            "plain": twin(lambda kernels: lambda x, w, b: kernels.layer_norm(x, w, b, EPS)),
            "liger_kernel": liger,
            "apex": apex,
            "flash_attn": flash_attention(),
        },
    )


def gelu(features: int) -> Case:
    def eager(x, w, b):
        return torch_functional.gelu(layer_norm(x, w, b))

    return Case(
        f"layer_norm+gelu C={features}",
        shapes(features, 1),
        ours=lambda x, w, b: fast.layer_norm(x, w.shape, w, b, EPS, activation="gelu"),
        torch=eager,
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 3 * e,  # read dy and x, write dx
        check=close_to(eager, rowwise=True),
    )


def seam(p: float, features: int) -> Case:
    """The post-norm seam; what is written beside y is h, for the backward pass."""

    def eager(x, r, w, b):
        return layer_norm(r + torch_functional.dropout(x, p), w, b)

    return Case(
        f"dropout+add+layer_norm p={p:g} C={features}" if p else f"add+layer_norm C={features}",
        shapes(features, 2),
        ours=lambda x, r, w, b: fast.dropout_add_layer_norm(x, r, w.shape, w, b, EPS, p),
        torch=eager,
        forward_bytes=lambda e: 4 * e,  # read x and skip, write h and y
        backward_bytes=lambda e: (
            (4 if p else 3) * e
        ),  # read dy and h, write dx and, where it is not dx, dskip
        check=follows_its_mask(p) if p else close_to(eager, rowwise=True),
        peers={"flash_attn": flash_attention(p)},
    )


def follows_its_mask(p: float):
    """The check of the seam: its mask, which no result shows, is where the gradient of skip is not 0, but dx is."""

    def check(inputs, y, dy, grads):
        x, skip, weight, bias = (t.detach().float() for t in inputs)
        dx, dskip = grads[0].float(), grads[1].float()
        tolerance = TOLERANCE[inputs[0].dtype]
        clear = dskip.abs() > tolerance  # elsewhere, a kept gradient may round to 0
        keep = dx != 0
        rate = float((~keep & clear).sum() / clear.sum().clamp(min=1))
        # 6 standard errors (one false alarm in 10⁹), plus the 1/256 to which some peers round p.
        if abs(rate - p) > 6 * (p * (1 - p) / max(1, int(clear.sum()))) ** 0.5 + 1 / 256:
            return f"drop rate {rate:.4f}, not {p}"
        if not torch.isclose(dx, dskip / (1 - p), rtol=tolerance, atol=tolerance)[keep].all():
            return "the gradient is not that of skip, scaled"
        h = skip + torch.where(keep, x / (1 - p), 0)
        # A row with an element whose mask is not known says nothing.
        known = clear.all(-1)
        wrong = ~torch.isclose(y.float(), layer_norm(h, weight, bias), rtol=tolerance, atol=4 * tolerance)
        unknown_share = (~clear).float().mean()
        if wrong[known].any() or wrong.float().mean() > 0.01 + 2 * unknown_share:
            return (
                f"{int(wrong.sum())} of {wrong.numel()} outputs do not follow the mask of the backward pass"
            )
        return None

    return check


CASES = (
    plain(768),
    plain(1024),
    plain(4096),
    plain(8192),
    plain(16384),
    gelu(4096),
    seam(0.0, 4096),
    seam(0.1, 1024),
    seam(0.1, 4096),
    seam(0.1, 8192),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles: the launches of the public functions, on tensors without data

SIZES = ((65536, 768), (65536, 1024), (8192, 4096), (8192, 8192), (4096, 16384))  # rows, columns


def kernels() -> list[Kernel]:
    """Every kernel at the widths of language models, as forward and backward launch it."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for size in SIZES:
            show = {"headline": size[1] == 4096}
            found += variants(dtype, f"C={size[1]}", size, **show)
            found += variants(dtype, f"dropout+add C={size[1]}", size, p=0.1, **show)
        found += variants(dtype, "gelu+residual C=4096", SIZES[2], "gelu", residual=True)
        found += variants(dtype, "C=64", (1 << 20, 64))
        found += variants(dtype, "2^32 elements C=65536", (65536, 65536))
        # Odd sizes: rows that no vector divides, and tiles that are not full.
        found += variants(dtype, "C=769", (65535, 769))
        found += variants(dtype, "dropout+add C=5120", (8191, 5120), p=0.1)
    found += variants(torch.bfloat16, "add C=4096", SIZES[2], add=True)
    found += variants(torch.bfloat16, "prenorm C=4096", SIZES[2], p=0.1, prenorm=True)
    found += variants(torch.bfloat16, "2^32 elements C=4096", (1 << 20, 4096))
    found += variants(torch.float16, "C=4096", SIZES[2])
    found += variants(torch.float16, "dropout+add C=4096", SIZES[2], p=0.1)
    found += variants(torch.float64, "C=1024", SIZES[1])
    found += [summing(torch.bfloat16)]
    return found


def variants(
    dtype,
    name,
    size,
    activation=None,
    *,
    p: float = 0.0,
    add: bool = False,
    residual: bool = False,
    prenorm: bool = False,
    **show,
):
    """Forward and backward kernels of one form."""
    form = ops.Form(size[1], EPS, dtype, activation, round(p * 2**16), 1 / (1 - p))
    add = add or p > 0
    x = torch.empty(size, dtype=dtype, device="meta")
    parameter = x.new_empty(form.columns)
    statistics = torch.empty(2, size[0], dtype=ops.sum_dtype(dtype), device="meta")
    e, label = dtype.itemsize, f"{short_name(dtype)} {name}"

    skip, other = x if add else None, x if residual else None
    (forward,) = ops.forward_launches(
        x, skip, parameter, parameter, other, x, skip, statistics, Stream(1), form
    )
    yield kernel(label, forward, x, e * (2 + 2 * add + residual), **show)

    backward = ops.backward_launches(
        x, x if prenorm else None, x, parameter, parameter, other, statistics,
        x, x if p else None, parameter, parameter, other, Stream(1), form,
    )  # fmt: skip
    for launch in backward:
        if launch.kernel is ops.kernels.backward_columns:
            yield kernel(label, launch, x, e * (2 + residual), **show)
        elif launch.kernel.__name__ != "sum_partials":
            yield kernel(label, launch, x, e * (3 + (p > 0) + 2 * residual + prenorm), **show)


def kernel(label, launch, x, bytes_per_element, **show) -> Kernel:
    name = launch.kernel.__name__
    plan = launch.arguments["plan"]
    trips = ()
    if name.endswith("_long"):
        chunks = -(-x.shape[1] // plan.columns)
        trips = [chunks, chunks]
    elif name.startswith("backward"):
        trips = x.shape[0] / plan.rows / launch.grid[-1]
    return Kernel.of(
        f"{name} {label}",
        launch,
        x.numel(),
        bytes_per_element + bytes_of(launch, "tensors.statistics", "sums.dweight", "sums.dbias") / x.numel(),
        trips=trips,
        budget=budget_of(launch, x),
        **show,
    )


def summing(dtype) -> Kernel:
    """The last kernel of the backward pass, at 264 programs of 4,096 columns."""
    partial_sums = torch.empty(2, 264, 4096, dtype=torch.float32, device="meta")
    parameter = torch.empty(4096, dtype=dtype, device="meta")
    launch = sum_launch(partial_sums, parameter, parameter)
    budget = Budget(narrow_loads=1000, narrow_stores=1000, shared_bytes=1 << 14, min_headroom=0)
    return Kernel.of("sum_partials", launch, partial_sums.numel(), 4, trips=264 / 64, budget=budget)


def budget_of(launch, x) -> Budget:
    """Memory sets the time. Shared memory holds the rows that are on their way (backward), tiles of several rows that
    change hands between the threads (forward, sm_80) and sums across warps."""
    plan = launch.arguments["plan"]
    narrow = 8 if plan.vector * x.element_size() == 16 else 10000  # the statistics of the rows
    block = plan.rows * plan.columns
    moved = 16 if "backward" in launch.kernel.__name__ else 4 if plan.rows > 1 else 0
    h100, b200 = 1.0, 1.0
    if x.element_size() == 2 and not plan.even_columns:
        # A B200 reads an element of bf16 in the time of 10 instructions: too little for the lanes beside a row that is
        # no power of 2, and for accesses of single elements where no vector divides it (nor are these in pairs, of
        # which two instructions make fp32).
        h100, b200 = (1.0, 0.9) if narrow == 8 else (0.95, 0.5)
    return Budget(
        narrow_loads=narrow,
        narrow_stores=narrow,
        shared_bytes=2048 + moved * block,
        sectors=1 if narrow == 8 else 3.6,  # rows that begin anywhere are read an element a lane
        min_headroom={80: 1, 90: h100, 100: b200},
    )
