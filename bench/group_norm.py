"""Group and instance normalization of feature maps, channels first and last."""

import math

import torch
import torch.nn.functional as torch_functional

import fastreg.functional as fast

from .batch_norm import BUDGET, inputs, variants
from .cases import Case, close_to, images, twin
from .sass import Kernel


def whole_groups(numel: int) -> tuple[int, int, int, int]:
    """512 channels, whatever the size: where it asks for less, the planes are smaller."""
    side = min(28, max(1, math.isqrt(numel // 512)))
    return images(max(numel, 512), side, channels=512)


def group(layout: str, activation: str | None = None, groups: int = 32) -> Case:
    def eager(x, w, b):
        y = torch_functional.group_norm(x, groups, w.to(x.dtype), b.to(x.dtype))
        return y if activation is None else getattr(torch_functional, activation)(y)

    return Case(
        f"group_norm({groups}) {layout}" + (f"+{activation}" if activation else ""),
        inputs(layout == "NHWC", False, whole_groups),
        ours=lambda x, w, b: fast.group_norm(x, groups, w, b, activation=activation),
        torch=eager,
        forward_bytes=lambda e: 2 * e,  # read x, write y: a group fits the registers of a program
        backward_bytes=lambda e: 3 * e,  # read dy and x, write dx
        check=close_to(eager),
        peers=group_peers(groups) if activation is None and layout == "NCHW" else {},
    )


def group_peers(groups: int) -> dict:
    plain = twin(lambda kernels: lambda x, w, b: kernels.group_norm(x, groups, w, b))
    return {"plain": plain, "liger_kernel": liger(groups)}


def liger(groups: int):
    def build():
        from liger_kernel.ops.group_norm import LigerGroupNormFunction

        def call(x, w, b):
            w, b = w.to(x.dtype), b.to(x.dtype)
            return LigerGroupNormFunction.apply(x, w, b, x.shape[1], groups, 1e-5)

        return call

    return build


def instance(layout: str) -> Case:
    def eager(x, w, b):
        return torch_functional.instance_norm(x, weight=w.to(x.dtype), bias=b.to(x.dtype))

    return Case(
        f"instance_norm {layout}",
        inputs(layout == "NHWC", False),
        ours=lambda x, w, b: fast.instance_norm(x, weight=w, bias=b),
        torch=eager,
        forward_bytes=lambda e: 2 * e,
        backward_bytes=lambda e: 3 * e,
        check=close_to(eager),
    )


CASES = (
    *(group(layout, activation) for layout in ("NCHW", "NHWC") for activation in (None, "silu")),
    instance("NCHW"),
    instance("NHWC"),
)


def kernels() -> list[Kernel]:
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in ("NCHW", "NHWC"):
            show = {"headline": dtype == torch.bfloat16}
            found += variants(dtype, (32, 512, 28, 28), layout, 32, note="G=32", budget=BUDGET, **show)
            if dtype != torch.float16:
                found += variants(dtype, (32, 512, 28, 28), layout, 32, "silu", note="G=32", budget=BUDGET)
    for dtype in (torch.bfloat16, torch.float32):
        for layout in ("NCHW", "NHWC"):
            # Instance normalization; and the UNet of Stable Diffusion, whose groups of 10 no vector divides.
            found += variants(dtype, (64, 256, 56, 56), layout, 256, note="instance", budget=BUDGET)
            found += variants(dtype, (8, 320, 64, 64), layout, 32, "silu", note="groups of 10", budget=BUDGET)
    return found
