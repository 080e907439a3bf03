"""Linear layers with Gaussian noise on their weights, for every example its own: none of it in memory.

The noise of a sum is normal too, so it is drawn for the sum (local reparameterization): behind a dense product where it
is isotropic (``kernels/noisy_linear.py``), and beside it otherwise (``fastreg/ops/linear/dual_linear.py``).
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastreg import random
from fastreg.ops import arguments, backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.checks import check_activation
from fastreg.ops.fused import activated, activation_gradient, derivative, kept_of, needs_argument
from fastreg.ops.launch import planned
from fastreg.ops.layout import row_blocks
from fastreg.ops.linear import dual_linear
from fastreg.ops.linear.checks import cast_by_autocast, on_kernels, torch_refuses
from fastreg.ops.operator import apply, keep, kept, needs_definition, operator
from fastreg.random import Stream

if backend.HAS_TRITON:
    from fastreg.kernels import noisy_linear as kernels

MODES = ("additive", "multiplicative", "factorised")


# --- noise with a deviation for each row ------------------------------------------------------------------


def _definition(x: Tensor, deviation: Tensor, stream: Stream | None) -> Tensor:
    if stream is None:
        eps = torch.randn(x.shape, dtype=deviation.dtype, device=x.device)
    else:
        eps = random.row_normals(x.shape[0], x.shape[1], stream, dtype=deviation.dtype, device=x.device)
    return (x + deviation[:, None] * eps).to(x.dtype)


def _arguments(columns: int, stream: Stream) -> dict:
    block, _ = row_blocks(columns)
    draw = {**number("seed", stream.seed, 0), "offset": stream.offset}
    return draw | {"columns": columns, "BLOCK": block, "num_warps": max(1, block // 256)}


@planned
def forward_launches(
    x: Tensor,
    deviation: Tensor,
    y: Tensor,
    before: Tensor | None,
    stream: Stream,
    activation: str | None,
) -> list[Launch]:
    """x, y, before: contiguous."""
    blocks = row_blocks(x.shape[1])[1]
    tensors = {"x_ptr": x, "deviation_ptr": deviation, "y_ptr": y, "before_ptr": before}
    arguments = tensors | {"blocks": blocks, "ACTIVATION": activation} | _arguments(x.shape[1], stream)
    return [Launch(kernels.row_noise, (len(x) * blocks,), arguments)]


@planned
def backward_launches(
    dy: Tensor,
    y_or_before: Tensor | None,
    dx: Tensor | None,
    ddeviation: Tensor | None,
    stream: Stream,
    activation: str | None,
) -> list[Launch]:
    """dy, y_or_before, dx: contiguous. Without an activation dx is dy, and not written."""
    tensors = {"dy_ptr": dy, "kept_ptr": y_or_before, "dx_ptr": dx, "ddeviation_ptr": ddeviation}
    arguments = tensors | {"DERIVATIVE": derivative(activation)} | _arguments(dy.shape[1], stream)
    return [Launch(kernels.row_noise_backward, (len(dy),), arguments)]


@operator("fastreg::row_noise", writes=["y", "before"])
def _forward(
    x: Tensor,
    deviation: Tensor,
    y: Tensor,
    before: Tensor | None,
    stream: Stream,
    activation: str | None,
) -> None:
    """y, before: contiguous. before: what stands before the activation, if wanted."""
    forward_launches.run(x.contiguous(), deviation.contiguous(), y, before, stream, activation)


@operator("fastreg::row_noise_backward", writes=["dx", "ddeviation"])
def _backward(
    dy: Tensor,
    y_or_before: Tensor | None,
    dx: Tensor | None,
    ddeviation: Tensor | None,
    stream: Stream,
    activation: str | None,
) -> None:
    """dx: contiguous; None without an activation, as it is dy. ddeviation: if wanted."""
    backward_launches.run(dy.contiguous(), y_or_before, dx, ddeviation, stream, activation)


class _RowNoise(torch.autograd.Function):
    """The result, and what stands before its activation, if the derivative of that needs it. Saves the stream, and for
    the activation one of the two, by which second derivatives come back to this function."""

    @staticmethod
    def forward(ctx, x, deviation, seed, offset, activation):
        ctx.set_materialize_grads(False)
        stream = Stream(seed, offset)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        before = torch.empty_like(y) if needs_argument(activation) and any(ctx.needs_input_grad) else None
        _forward(x, deviation, y, before, stream, activation)
        ctx.activation = activation
        keep(ctx, stream, kept_of(y, before, activation))
        return y, before

    @staticmethod
    def backward(ctx, dy, dbefore):
        if torch.compiler.is_compiling():
            dbefore = None  # nothing else takes it there
        if dy is None and dbefore is None:
            return (None,) * 5
        stream, y_or_before = kept(ctx)
        needs_x, needs_deviation = ctx.needs_input_grad[:2]
        by_definition, activation = needs_definition(dy, dbefore), ctx.activation
        if activation is not None and (by_definition or dbefore is not None):
            dy, activation = activation_gradient(dy, y_or_before, activation, dbefore), None
        dx = None if activation is None else torch.empty_like(dy, memory_format=torch.contiguous_format)
        ddeviation = None
        if needs_deviation and by_definition:
            eps = random.row_normals(dy.shape[0], dy.shape[1], stream, device=dy.device)
            ddeviation = (dy * eps).sum(1).to(torch.float32)
        elif needs_deviation:
            ddeviation = torch.empty(dy.shape[0], dtype=torch.float32, device=dy.device)
        if not by_definition and (needs_deviation or activation is not None):
            _backward(dy, y_or_before, dx, ddeviation, stream, activation)
        return (dy if dx is None else dx) if needs_x else None, ddeviation, None, None, None


def row_noise(x: Tensor, deviation: Tensor, activation=None, seed=None, generator=None) -> Tensor:
    """activation(x + deviation eps) for x ``[rows, columns]`` and a deviation ``[rows]`` (fp32; fp64 for fp64)."""
    if on_kernels(x, deviation) and x.numel() != 0 and x.shape[0] <= backend.MOST_PROGRAMS:
        return apply(_RowNoise, x, deviation, *random.stream(x.device, seed, generator), activation)[0]
    drawn = random.is_wanted(seed, generator)
    stream = random.stream(x.device, seed, generator) if drawn else None
    return activated(_definition(x, deviation, stream), activation)


# --- the public function ----------------------------------------------------------------------------------


def noisy_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    sigma: float | Tensor = 0.1,
    training: bool = True,
    *,
    mode: str = "additive",
    bias_sigma: float | Tensor | None = None,
    activation: str | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """activation of a linear layer whose weights are noisy in training: every example has noise of its own.

    =================  ==============================================  =============================================
    mode               weights of an example                           the sum
    =================  ==============================================  =============================================
    "additive"         W + sigma E, E standard normal                  Wv + sigma |v| eps
    "multiplicative"   W ∘ (1 + sigma E)                               Wv + sigma sqrt((W ∘ W)(v ∘ v)) eps
    "factorised"       W + Sigma ∘ (e_out e_in^T)                      Wv + e_out ∘ (Sigma (e_in ∘ v))
    =================  ==============================================  =============================================

    eps is standard normal, independent for every example and output, and the sums are exact in distribution, for each
    example alone and for all together. e_in and e_out are sign(x) sqrt|x| of standard normals x.

    Args:
        input: ``[*, inputs]``; all leading dimensions count examples.
        weight: ``[outputs, inputs]``, the dtype of the input.
        bias: ``[outputs]`` or None.
        sigma: a number, or a tensor of one element, which has a gradient: the noise may be learned. Of "factorised" a
            number, or ``[outputs, inputs]`` in the dtype of the weights.
        bias_sigma: deviation of noise on the bias. Of "additive" as sigma is, of "factorised" a number or
            ``[outputs]``. "multiplicative" has none.
        activation: a name of ``fastreg.functional.ACTIVATIONS``.
        seed, generator: as in :func:`fastreg.functional.dropout`.

    Returns: ``[*, outputs]``. In evaluation the layer has no noise.

    Raises:
        ValueError: an unknown mode or activation; a negative number for sigma or bias_sigma; a tensor of another shape.
        RuntimeError: torch's own of ``linear``, for shapes, dtypes and devices that do not fit.

    Source: Fortunato et al. 2018 (arXiv 1706.10295; there one draw serves a batch) for factorised noise; Kingma,
    Salimans, Welling 2015 (arXiv 1506.02557) for drawing it at the sums.
    """
    sigma, bias_sigma = checked_arguments(sigma, mode, bias_sigma, activation)
    if not training:
        return activated(F.linear(input, weight, bias), activation)
    input, weight, bias = cast_by_autocast(input, weight, bias)
    if torch_refuses(input, weight, bias):
        F.linear(input, weight, bias)  # raises
    _check_shapes(weight, sigma, mode, bias_sigma)
    v = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    if mode == "factorised":
        weight_sigma = _filled(sigma, weight, weight.shape)
        own = None if bias_sigma is None else _filled(bias_sigma, weight, weight.shape[:1])
        z = dual_linear.factorised_linear(v, weight, weight_sigma, bias, own, activation, seed, generator)
    elif mode == "multiplicative":
        sigma = sigma.reshape(()) if isinstance(sigma, Tensor) else sigma
        z = dual_linear.gaussian_linear(v, weight, bias, 1.0, sigma, activation, seed, generator)
    else:
        deviation = _deviation(v, sigma, bias_sigma)
        z = row_noise(F.linear(v, weight, bias), deviation, activation, seed, generator)
    return z.view(*input.shape[:-1], weight.shape[0])


def _deviation(v: Tensor, sigma, bias_sigma) -> Tensor:
    """sqrt(sigma^2 |v|^2 + bias_sigma^2) of each example, fp32 at least."""
    wide = torch.promote_types(v.dtype, torch.float32)
    norm = torch.linalg.vector_norm(v, dim=-1, dtype=wide)
    sigma = sigma.reshape(()).to(wide) if isinstance(sigma, Tensor) else sigma
    if bias_sigma is None:
        return norm * sigma
    bias_sigma = bias_sigma.reshape(()).to(wide) if isinstance(bias_sigma, Tensor) else bias_sigma
    return dual_linear.root((norm * sigma).square() + bias_sigma**2)


def _filled(sigma: float | Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    return sigma.to(weight.dtype) if isinstance(sigma, Tensor) else weight.new_full(shape, sigma)


_Sigma = TypeVar("_Sigma", float, Tensor, float | Tensor)


def checked_arguments(
    sigma: _Sigma,
    mode: str = "additive",
    bias_sigma: float | Tensor | None = None,
    activation: str | None = None,
) -> tuple[_Sigma, float | Tensor | None]:
    """sigma and bias_sigma, as Python's numbers where they are no tensors."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    sigma = _checked_sigma("sigma", sigma)
    bias_sigma = None if bias_sigma is None else _checked_sigma("bias_sigma", bias_sigma)
    if mode == "multiplicative" and bias_sigma is not None:
        raise ValueError('mode="multiplicative" has no bias_sigma')
    check_activation(activation)
    return sigma, bias_sigma


def _checked_sigma(name: str, value: _Sigma) -> _Sigma:
    if isinstance(value, Tensor):
        return value
    if type(value) is not float:
        value = arguments.number(name, value)
    if not value >= 0:
        raise ValueError(f"{name} has to be at least 0, but got {value}")
    return value


def _check_shapes(weight: Tensor, sigma, mode: str, bias_sigma) -> None:
    factorised = mode == "factorised"
    wanted = {"sigma": weight.shape, "bias_sigma": weight.shape[:1]}
    for name, value in (("sigma", sigma), ("bias_sigma", bias_sigma)):
        if not isinstance(value, Tensor):
            continue
        if value.device != weight.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but got {name} is on {value.device}, different from other tensors on {weight.device}"
            )
        if value.shape != wanted[name] if factorised else value.numel() != 1:
            expected = f"the shape {tuple(wanted[name])}" if factorised else "one element"
            raise ValueError(f"{name} has to have {expected}, but got {tuple(value.shape)}")
