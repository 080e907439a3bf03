"""Gaussian noise on a tensor, additive or multiplicative.

One function on two backends: the Triton kernel of ``kernels/noise.py`` (CUDA) and the definition in ATen (CPU,
``torch.func`` transforms). The additive form has the identity for a derivative. The multiplicative one is linear, and
its own derivative: the backward pass is the forward pass on dy, so that derivatives of any order run on the kernel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fastreg import random
from fastreg.ops import arguments, backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.dropout import ATEN_BELOW
from fastreg.ops.layout import ceil_div, dense_strides, with_strides
from fastreg.random import Stream

if backend.HAS_TRITON:
    from fastreg.kernels import noise as kernels

MODES = ("additive", "multiplicative")


class _Form(NamedTuple):
    std: float
    multiplicative: bool
    stride: tuple[int, ...]  # of the result, dense: elements count in the memory order of these strides


# --- the definition, in ATen ------------------------------------------------------------------------------


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _definition(x: Tensor, eps: Tensor, std: float, multiplicative: bool) -> Tensor:
    """eps: standard normals in the dtype that is computed in; the result is rounded once."""
    y = x * (1 + std * eps) if multiplicative else torch.add(x, eps, alpha=std)
    return y.to(x.dtype)


def _drawn(x: Tensor, stream: Stream, stride: tuple[int, ...]) -> Tensor:
    """The normals of ``stream`` for a tensor like ``x`` with these strides."""
    eps = random.normal((x.numel(),), stream, dtype=_computed_in(x), device=x.device)
    return eps.as_strided(x.shape, stride)


# --- the launch -------------------------------------------------------------------------------------------


def _launch(x: Tensor, y: Tensor, stream: Stream, std: float, multiplicative: bool) -> Launch:
    """x, y: dense, with one layout."""
    vector = max(4, 16 // x.element_size())
    vectors, tail = divmod(x.numel(), vector)
    block = 4096 if x.numel() >= 1 << 20 else 1024  # small enough that there are programs to fill a GPU
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        **number("seed", stream.seed, 0),
        "offset": stream.offset,
        "std": std,
        "vectors": vectors,
        "tail": tail,
        "MULTIPLICATIVE": multiplicative,
        "RAGGED": tail > 0,
        "BLOCK": block,
        "VECTOR": vector,
        "WIDE": x.numel() >= 1 << 31,
        "num_warps": 4,
    }
    return Launch(kernels.add_noise, (max(1, ceil_div(vectors * vector, block)),), arguments)


def _run(x: Tensor, stream: Stream, form: _Form, out: Tensor | None = None) -> Tensor:
    """The kernel on a tensor of any layout. ``out``: where to write, ``x`` itself or None."""
    laid_out = with_strides(x, form.stride)
    in_place = out is not None and laid_out is x
    y = out if in_place else laid_out.new_empty_strided(x.shape, form.stride)
    if x.numel():
        _launch(laid_out, y, stream, form.std, form.multiplicative).run(x.device)
    return y if out is None or in_place else out.copy_(y)


# --- autograd, eager --------------------------------------------------------------------------------------


class _GaussianNoise(torch.autograd.Function):
    """The eager path to the kernel. Saves the stream and no tensor of the input's size."""

    @staticmethod
    def forward(ctx, x, seed, offset, form, inplace):
        if inplace:
            ctx.mark_dirty(x)
        in_memory = isinstance(seed, Tensor)
        ctx.seed, ctx.offset, ctx.form = None if in_memory else seed, offset, form
        ctx.save_for_backward(seed if in_memory else None)
        return _run(x, Stream(seed, offset), form, out=x if inplace else None)

    @staticmethod
    def backward(ctx, dy):
        if ctx.form.multiplicative:
            (seed,) = ctx.saved_tensors
            dy = _with_noise(dy, Stream(ctx.seed if seed is None else seed, ctx.offset), ctx.form)
        return dy, None, None, None, None


# --- a registered operator, for torch.compile -------------------------------------------------------------
# Dynamo meets it; an eager call does not pay for the dispatcher.


@torch.library.custom_op("fastreg::gaussian_noise", mutates_args=())
def _noise_op(x: Tensor, seed: Tensor, std: float, multiplicative: bool, stride: Sequence[int]) -> Tensor:
    return _run(x, Stream(seed), _Form(std, multiplicative, tuple(stride)))


@_noise_op.register_fake
def _(x, seed, std, multiplicative, stride):
    return x.new_empty_strided(x.shape, stride)


def _save_for_compiled_backward(ctx, inputs, output):
    _, seed, *form = inputs
    ctx.form = _Form(*form)
    ctx.save_for_backward(seed)


def _compiled_backward(ctx, dy):
    dx = _noise_op(dy, *ctx.saved_tensors, *ctx.form) if ctx.form.multiplicative else dy
    return dx, None, None, None, None


_noise_op.register_autograd(_compiled_backward, setup_context=_save_for_compiled_backward)


# --- the public function ----------------------------------------------------------------------------------


def _with_noise(x: Tensor, stream: Stream, form: _Form, inplace: bool = False) -> Tensor:
    if not backend.runs_kernels(x):
        y = _definition(x, _drawn(x, stream, form.stride), form.std, form.multiplicative)
    elif torch.compiler.is_compiling():
        seed = stream.seed_on(x.device)
        y = _noise_op(x, seed, *form)
    else:
        y = _GaussianNoise.apply(x, *stream, form, inplace)
        return x if inplace else y  # y is x too, but for a leaf under no_grad, where autograd gives an alias
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
    if inplace and input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    multiplicative = mode == "multiplicative"
    ours = backend.runs_kernels(input) and backend.worth_a_launch(input, ATEN_BELOW)
    if ours or random.is_wanted(seed, generator):
        stream = random.stream(input.device, seed, generator)
        return _with_noise(input, stream, _Form(std, multiplicative, dense_strides(input)), inplace)
    y = _definition(input, torch.randn_like(input, dtype=_computed_in(input)), std, multiplicative)
    return input.copy_(y) if inplace else y
