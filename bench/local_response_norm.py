"""Local response normalization at the sizes of the networks that had it, and of the vision networks of today."""

import torch
import torch.nn.functional as torch_functional

import fastreg.functional as fast
from fastreg.ops.norms import local_response_norm as ops

from .cases import Case, close_to, images, random, twin
from .sass import Budget, Kernel, short_name

ALEXNET = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}  # alpha / n = 1e-4, as in the paper


def odd_images(numel: int) -> tuple[int, int, int, int]:
    """Behind the first convolution of AlexNet: planes that no vector divides."""
    return images(numel, side=55, channels=96)


def plain(layout: str, shape=images, name="") -> Case:
    return Case(
        f"local_response_norm n=5 {layout}{name}",
        random(shape, channels_last=layout == "NHWC"),
        ours=lambda x: fast.local_response_norm(x, **ALEXNET),
        torch=lambda x: torch_functional.local_response_norm(x, **ALEXNET),
        forward_bytes=lambda e: 2 * e,  # read x, write y
        backward_bytes=lambda e: 3 * e,  # read dy and x, write dx
        check=close_to(lambda x: torch_functional.local_response_norm(x, **ALEXNET), rowwise=True),
        peers={}
        if layout == "NHWC"
        else {"plain": twin(lambda kernels: lambda x: kernels.local_response_norm(x, **ALEXNET))},
    )


CASES = (
    plain("NCHW"),
    plain("NHWC"),
    plain("NCHW", odd_images, " 55x55"),
)


# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles: the launches of the public function, on tensors without data


def kernels() -> list[Kernel]:
    """Every form at sizes of training, as forward and backward launch it."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in ("NCHW", "NHWC"):
            found += variants(dtype, layout, headline=dtype != torch.float16)
            if dtype == torch.float16:
                continue
            found += variants(dtype, layout, "gelu+residual", activation="gelu", residual=True)
            found += variants(dtype, layout, "n=8 mish+residual", size=8, activation="mish", residual=True)
            # Wide windows: backward computes 15 channels beside the 16 it owns.
            found += variants(dtype, layout, "n=16", size=16, headroom=0.45)
    for layout in ("NCHW", "NHWC"):
        found += variants(torch.bfloat16, layout, "beta=0.6", beta=0.6)
        found += variants(torch.bfloat16, layout, "2^32 elements", shape=(1 << 10, 64, 256, 256))
        # No spills: fp64 is not there for speed.
        found += variants(
            torch.float64, layout, "gelu+residual", activation="gelu", residual=True, headroom=0
        )
    # Sizes that no vector divides.
    found += variants(torch.bfloat16, "NCHW", "55x55", shape=(128, 96, 55, 55), headroom=0.55)
    found += variants(torch.bfloat16, "NHWC", "C=3", shape=(128, 3, 256, 256), headroom=0.25)
    return found


def variants(
    dtype, layout, name="", *, shape=(64, 256, 32, 32), size=5, beta=0.75, activation=None, residual=False,
    headroom=None, headline=False,
):  # fmt: skip
    """The forward and the backward kernel of one form."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last) if layout == "NHWC" else x
    form = ops.Form(size, 1e-4, beta, 1.0, activation)
    e = dtype.itemsize
    label = short_name(dtype)
    other = x if residual else None
    launches = {
        "forward": (ops.forward_launches(x, other, x, form), 3 * e if residual else 2 * e),
        "backward": (ops.backward_launches(x, x, other, x, other, form), 5 * e if residual else 3 * e),
    }
    for direction, ((launch,), bytes_per_element) in launches.items():
        yield Kernel.of(
            f"{direction} {label} {layout} {name}".strip(),
            launch,
            x.numel(),
            bytes_per_element,
            budget=budget_of(launch.arguments["plan"], e, headroom),
            headline=headline,
        )


def budget_of(plan, e, headroom) -> Budget:
    return Budget(
        # Backward holds two windows for each position of a vector: 8 positions of 16 bits would spill. A warp still
        # reads 256 bytes in a row. The vectors before and behind a row of channels_last come from L1, and the
        # assembler loads only the part of them that is used.
        access_bytes=min(16, plan.vector * e),
        narrow_loads=1000 if plan.last else 0,
        # Where channels are last a thread has 16 neighbouring ones, in two vectors (four of fp32): lanes of a request
        # are 32 (64) bytes apart, each with half of a sector. Another request, load or store, has the rest.
        sectors=2 if plan.last else 1,
        # A B200 reads a bf16 element in the time of 20 instructions, and n = 8 with mish takes a little more.
        min_headroom={80: 1, 90: 1.5, 100: 0.75} if headroom is None else headroom,
    )
