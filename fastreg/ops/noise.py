"""Gaussian noise on a tensor, additive or multiplicative.

One function on two backends: the Triton kernel of ``kernels/noise.py`` (CUDA) and the definition in ATen (CPU,
``torch.func`` transforms). The additive form has the identity for a derivative. The multiplicative one is linear, and
its own derivative: the backward pass is the forward pass on dy, so that derivatives of any order run on the kernel.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fastreg import random
from fastreg.ops import arguments, backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.checks import check_leaf
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div, dense_strides, empty_dense, is_dense, with_strides
from fastreg.ops.operator import apply, keep, kept, operator
from fastreg.random import Stream

if backend.HAS_TRITON:
    from fastreg.kernels import noise as kernels

MODES = ("additive", "multiplicative")


class Form(NamedTuple):
    std: float
    multiplicative: bool


# --- the definition, in ATen ------------------------------------------------------------------------------


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _definition(x: Tensor, eps: Tensor, form: Form) -> Tensor:
    """eps: standard normals in the dtype that is computed in; the result is rounded once."""
    y = x * (1 + form.std * eps) if form.multiplicative else torch.add(x, eps, alpha=form.std)
    return y.to(x.dtype)


def _drawn(x: Tensor, stream: Stream, stride: tuple[int, ...]) -> Tensor:
    """The normals of ``stream`` for a tensor like ``x`` with these strides."""
    eps = random.normal((x.numel(),), stream, dtype=_computed_in(x), device=x.device)
    return eps.as_strided(x.shape, stride)


# --- the launch -------------------------------------------------------------------------------------------


@planned
def launches(x: Tensor, y: Tensor, stream: Stream, form: Form) -> list[Launch]:
    """x, y: dense, with one layout."""
    vector = max(4, 16 // x.element_size())
    vectors, tail = divmod(x.numel(), vector)
    block = 4096 if x.numel() >= 1 << 20 else 1024  # small enough that there are programs to fill a GPU
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        **number("seed", stream.seed, 0),
        "offset": stream.offset,
        "std": form.std,
        "vectors": vectors,
        "tail": tail,
        "plan": kernels.Plan(
            multiplicative=form.multiplicative,
            ragged=tail > 0,
            block=block,
            vector=vector,
            wide=x.numel() >= 1 << 31,
        ),
        "num_warps": 4,
    }
    return [Launch(kernels.add_noise, (max(1, ceil_div(vectors * vector, block)),), arguments)]


# --- the operator -----------------------------------------------------------------------------------------


@operator("fastreg::gaussian_noise", writes=["y"])
def _noise(x: Tensor, y: Tensor, stream: Stream, form: Form) -> None:
    """y: of the dtype of x, which may have any layout; it may be x itself. Elements count in the memory order of
    ``dense(y)``."""
    if x.numel():
        result = y if is_dense(y) else torch.empty_like(y)
        launches.run(with_strides(x, result.stride()), result, stream, form)
        if result is not y:
            y.copy_(result)


# --- autograd ---------------------------------------------------------------------------------------------


class _GaussianNoise(torch.autograd.Function):
    """Saves the stream and no tensor of the input's size."""

    @staticmethod
    def forward(ctx, x, stride, seed, offset, form, inplace):
        y = x if inplace else empty_dense(x.shape, stride, x.dtype, x.device)
        if inplace:
            ctx.mark_dirty(x)
        stream = Stream(seed, offset)
        _noise(x, y, stream, form)
        ctx.stride, ctx.form = stride, form
        keep(ctx, stream)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx = dy
        if ctx.form.multiplicative:
            (stream,) = kept(ctx)
            if torch.compiler.is_compiling():
                dx = empty_dense(dy.shape, ctx.stride, dy.dtype, dy.device)
                _noise(dy, dx, stream, ctx.form)
            else:
                dx = _with_noise(dy, ctx.stride, stream, ctx.form)
        return dx, None, None, None, None, None


# --- the public function ----------------------------------------------------------------------------------


def _with_noise(
    x: Tensor, stride: tuple[int, ...], stream: Stream, form: Form, inplace: bool = False
) -> Tensor:
    """stride: of the result, dense. Elements count in the memory order of these strides."""
    if not backend.runs_kernels(x):
        y = _definition(x, _drawn(x, stream, stride), form)
    elif inplace and not torch.compiler.is_compiling():
        _GaussianNoise.apply(x, stride, *stream, form, True)
        return x  # without gradients, apply returns an alias
    else:
        y = apply(_GaussianNoise, x, stride, *stream, form, False)
    return x.copy_(y) if inplace else y


def checked_std(std: float, mode: str) -> float:
    """``std`` as Python's number."""
    if type(std) is not float:
        std = arguments.number("std", std)
    if not 0 <= std < math.inf:
        raise ValueError(f"std has to be finite and not negative, but got {std}")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    return std


def gaussian_noise(
    input: Tensor,
    std: float = 0.1,
    training: bool = True,
    inplace: bool = False,
    *,
    mode: str = "additive",
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""In training, normal noise on every element: ``input + std * eps``, or ``input * (1 + std * eps)``.

    One pass over memory. The noise is not stored: the gradient is that of the output (additive, no work at all), or
    takes the noise drawn again (multiplicative). Outside of training, and for std = 0, returns the input itself.

    Args:
        input: floating point, any shape and strides. The result has its layout and dtype; 16-bit types are computed
            in fp32 and rounded once.
        std: standard deviation of the noise, finite and not negative. Multiplicative noise with
            ``std = sqrt(p / (1 - p))`` has the mean and the variance of dropout with probability ``p``.
        training: add noise if True.
        inplace: write the result into ``input``.
        mode: "additive" or "multiplicative".
        seed: int, or int64 tensor of one element: eps is then :func:`fastreg.random.normal` on every device, up to
            the rounding of log, sin and cos; elements count in memory order.
        generator: draws the seed, instead of torch's default generator.

    Raises:
        ValueError: std negative, infinite or NaN; unknown mode; seed and generator.
        TypeError: input that is not floating point; std that is no number, such as a tensor that requires a gradient.
        RuntimeError: in-place on a leaf that requires a gradient.

    Source: Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization" (Neural Computation 7);
    multiplicative: Srivastava et al. 2014 (JMLR 15), section 10.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            gaussian_noise, (input,), input, std, training, inplace, mode=mode, seed=seed, generator=generator
        )
    std = checked_std(std, mode)
    if not input.is_floating_point():
        raise TypeError(f"gaussian_noise needs a floating point input, but got {input.dtype}")
    if not training or std == 0:
        return input
    if inplace:
        check_leaf(input)
    form = Form(std, mode == "multiplicative")
    ours = backend.runs_kernels(input) and backend.worth_a_launch(input, "noise")
    if ours or random.is_wanted(seed, generator):
        stream = random.stream(input.device, seed, generator)
        return _with_noise(input, dense_strides(input), stream, form, inplace)
    y = _definition(input, torch.randn_like(input, dtype=_computed_in(input)), form)
    return input.copy_(y) if inplace else y
