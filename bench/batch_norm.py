"""Batch normalization as it stands in convolutional networks: with its activation, and with a residual."""

import math

import torch
import torch.nn.functional as torch_functional

import fastreg.functional as fast
from fastreg.ops.norms import channel_norm as ops

from .cases import Case, close_to, images, twin
from .sass import Budget, Kernel, short_name


def stage(numel: int) -> tuple[int, int, int, int]:
    """The first stage of ResNet-50."""
    return images(numel, side=56, channels=256)


def inputs(channels_last: bool, residual: bool, shape=stage):
    """x and residual in the dtype of the case; weight and bias in fp32, as under autocast."""

    def make(numel, dtype, device):
        size = shape(numel)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x, r = (torch.randn(size, dtype=dtype, device=device).to(memory_format=layout) for _ in range(2))
        parameter = torch.float32 if dtype.itemsize == 2 else dtype
        w, b = torch.rand(2, size[1], dtype=parameter, device=device).unbind()
        tensors = (x, w.clone(), b.clone(), r) if residual else (x, w.clone(), b.clone())
        return tuple(t.requires_grad_() for t in tensors)

    return make


def eager_backend(x, w, b, *_) -> str:
    """What eager PyTorch runs in training: one block a channel where that is "Native"."""
    mean, var = w.detach(), b.detach()  # running statistics: their dtype and device take part in the choice
    return torch._C._select_batch_norm_backend(x, w, b, mean, var, True, 1e-5).name


def attorch(activation):
    def build():
        import attorch
        from torch import nn

        class Layer(nn.Module):
            layers: dict = {}  # noqa: RUF012

            def forward(self, x, w, b, r=None):
                layer = attorch.BatchNorm2d(x.shape[1], act_func=activation).to(x.device)
                layer.weight, layer.bias = nn.Parameter(w), nn.Parameter(b)
                return layer.train()(x) if r is None else layer.train()(x, r)

        return Layer()

    return build


def training(layout: str, activation: str | None = None, residual: bool = False) -> Case:
    def summed(x, w, b, r=None):
        y = torch_functional.batch_norm(x, None, None, w, b, True)
        return y if r is None else y + r

    def eager(*inputs):
        y = summed(*inputs)
        return y if activation is None else getattr(torch_functional, activation)(y)

    def ours(x, w, b, r=None):
        return fast.batch_norm(x, None, None, w, b, True, activation=activation, residual=r)

    signs = 1 / 8 if residual and activation == "relu" else 0
    is_plain = layout == "NCHW" and activation is None and not residual
    return Case(
        "batch_norm"
        + f" {layout}"
        + (f"+{activation}" if activation else "")
        + ("+residual" if residual else ""),
        inputs(layout == "NHWC", residual),
        ours=ours,
        torch=eager,
        # Read x for its statistics, then x (and the residual) again to write y: 3 (4).
        forward_bytes=lambda e: (4 if residual else 3) * e + signs,
        # Read dy and x for two sums, then both again to write dx: 5. With a residual the first pass writes its
        # gradient, which the second reads in place of dy: 6.
        backward_bytes=lambda e: (6 if residual and activation else 5) * e + signs,
        check=close_to(summed, relu=True) if activation == "relu" else close_to(eager),
        eager_backend=eager_backend,
        peers={"plain": twin(lambda kernels: kernels.batch_norm)} if is_plain else {},
    )


def evaluation(layout: str) -> Case:
    def call(batch_norm, **fused):
        def run(x, w, b):
            mean, var = torch.zeros_like(w), torch.ones_like(w)
            return batch_norm(x, mean, var, w, b, False, **fused)

        return run

    normalized = call(torch_functional.batch_norm)
    return Case(
        f"batch_norm evaluation {layout}+relu",
        inputs(layout == "NHWC", False),
        ours=call(fast.batch_norm, activation="relu"),
        torch=lambda x, w, b: normalized(x, w, b).relu(),
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 3 * e,  # read dy and x, write dx
        check=close_to(normalized, relu=True),
        eager_backend=eager_backend,
    )


CASES = (
    *(
        training(layout, activation, residual)
        for layout in ("NCHW", "NHWC")
        for activation, residual in ((None, False), ("relu", False), ("silu", False), ("relu", True))
    ),
    evaluation("NCHW"),
    evaluation("NHWC"),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles: the launches of the public functions, on tensors without data

LARGE = (64, 256, 56, 56)  # two passes
SMALL = (32, 2048, 7, 7)  # one launch


def kernels() -> list[Kernel]:
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in ("NCHW", "NHWC"):
            show = {"headline": dtype == torch.bfloat16}
            found += variants(dtype, LARGE, layout, **show)
            found += variants(dtype, LARGE, layout, activation="relu", residual=True, **show)
            if dtype != torch.float16:
                found += variants(dtype, LARGE, layout, activation="silu")
    for dtype in (torch.bfloat16, torch.float32):
        found += variants(dtype, (256, 3, 112, 112), "NCHW", note="C=3", budget=BUDGET)
        # 7 x 7: nothing that divides a plane. A program takes 392 lines, of 8 channels, in tiles of 512.
        found += variants(dtype, SMALL, "NCHW", activation="relu", note="7x7", budget=BUDGET)
    return found


def variants(
    dtype, size, layout, groups=0, activation=None, residual=False, note="", budget=None, headline=False
):
    """All kernels of one form, as forward and backward launch them in training."""
    x = torch.empty(size, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last) if layout == "NHWC" else x
    seen, form = ops.view(x, groups), ops.Form(groups, 1e-5, activation)
    parameter, statistic = (x.new_empty(n, dtype=torch.float32) for n in (size[1], seen.units))
    signed = ops.keeps_signs(x if residual else None, form, x)
    signs = x.new_empty(x.numel() // 8, dtype=torch.uint8) if signed else None
    r = x if residual else None
    running = (None, None, 0.0) if groups else (parameter, parameter, 0.1)
    launches = ops.forward_launches(
        x, parameter, parameter, r, x, signs, statistic, statistic, *running, form
    )
    lines = statistic.new_empty(seen.batches * seen.lines // seen.repeat)
    dv = x if residual and activation else None
    again = r if activation and not signed else None
    launches += ops.backward_launches(
        x, x, parameter, parameter, again, signs, statistic, statistic, x, lines, lines, dv, True, form
    )
    e, bit = dtype.itemsize, 1 / 8 if signed else 0
    accesses = {
        "statistics": e,  # x
        "apply": 2 * e + residual * e + bit,  # x, the residual, y
        "gradient_sums": 2 * e + (e if dv is not None else 0) + bit,  # dy, x, dv
        "gradient_apply": 3 * e,  # dy or dv, x, dx
        "whole_forward": 2 * e + residual * e + bit,
        "whole_backward": 3 * e + (e if dv is not None else 0) + bit,
    }
    form_name = "+".join(filter(None, (activation, "residual" if residual else None)))
    name_of_form = " ".join(filter(None, (short_name(dtype), layout, note, form_name)))
    for launch in launches:
        name = _name(launch.kernel)
        if name == "statistics" and form_name:
            continue  # the same as without
        if name in accesses:
            tiles = seen.segments * math.ceil(seen.along / launch.arguments["tile"].along)
            trips = tiles / launch.arguments.get("splits", 1)
            kept = launch.arguments.get("plan")
            parts = 1 if kept is None else kept.parts
            trips = {
                "statistics": trips - 1,  # the first tile is ahead of the loop
                "whole_forward": [max(trips - 1, 0)] * parts + [trips] * parts,
                "whole_backward": [trips] * (2 * parts),
            }.get(name, trips)
            if kept is not None and kept.tiles:
                trips = ()  # in registers: no loops
            yield Kernel.of(
                f"{name} {name_of_form}",
                launch,
                x.numel(),
                accesses[name],
                trips=trips,
                budget=budget or BUDGET,
                headline=headline,
            )


def _name(kernel) -> str:
    return getattr(kernel, "__name__", None) or kernel.fn.__name__


# Values of lines, and sums of lines, are narrow: a handful a program.
FEW_NARROW = {"narrow_loads": 64, "narrow_stores": 16, "shared_bytes": 8192, "sectors": 1.14}  # as counted
BUDGET = Budget(**FEW_NARROW)
