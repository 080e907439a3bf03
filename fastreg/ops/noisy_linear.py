"""Linear layers with Gaussian noise on their weights, for every example its own: none of it in memory.

The noise of a sum is normal too, so it is drawn for the sum (local reparameterization): behind a dense product where it
is isotropic (``kernels/noisy_linear.py``), and beside it otherwise (``fastreg/ops/dual_linear.py``).
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastreg import random
from fastreg.ops import backend, dual_linear
from fastreg.ops.backend import Launch, number
from fastreg.ops.drop_connect import cast_by_autocast, torch_refuses
from fastreg.ops.dual_linear import on_kernels, row_blocks
from fastreg.ops.fused import activated, check_activation
from fastreg.random import Stream

if backend.HAS_TRITON:
    from fastreg.kernels import noisy_linear as kernels

KINDS = ("additive", "multiplicative", "factorised")


# --- noise with a deviation for each row ------------------------------------------------------------------


def _definition(x: Tensor, deviation: Tensor, stream: Stream | None) -> Tensor:
    if stream is None:
        eps = torch.randn(x.shape, dtype=deviation.dtype, device=x.device)
    else:
        eps = random.row_normals(*x.shape, stream, dtype=deviation.dtype, device=x.device)
    return (x + deviation[:, None] * eps).to(x.dtype)


def _arguments(columns: int, stream: Stream) -> dict:
    block, _ = row_blocks(columns)
    draw = {**number("seed", stream.seed, 0), "offset": stream.offset}
    return draw | {"columns": columns, "BLOCK": block, "num_warps": max(1, block // 256)}


def forward_launch(x: Tensor, deviation: Tensor, y: Tensor, stream: Stream) -> Launch:
    blocks = row_blocks(x.shape[1])[1]
    tensors = {"x_ptr": x, "deviation_ptr": deviation, "y_ptr": y, "blocks": blocks}
    return Launch(kernels.row_noise, (len(x) * blocks,), tensors | _arguments(x.shape[1], stream))


def backward_launch(dy: Tensor, ddeviation: Tensor, stream: Stream) -> Launch:
    tensors = {"dy_ptr": dy, "ddeviation_ptr": ddeviation}
    return Launch(kernels.row_noise_backward, (len(dy),), tensors | _arguments(dy.shape[1], stream))


def _forward(x: Tensor, deviation: Tensor, stream: Stream) -> Tensor:
    x, deviation = x.contiguous(), deviation.contiguous()
    y = torch.empty_like(x)
    forward_launch(x, deviation, y, stream).run(x.device)
    return y


def _backward(dy: Tensor, stream: Stream) -> Tensor:
    ddeviation = torch.empty(len(dy), dtype=torch.float32, device=dy.device)
    backward_launch(dy.contiguous(), ddeviation, stream).run(dy.device)
    return ddeviation


class _RowNoise(torch.autograd.Function):
    """Saves nothing but the stream."""

    @staticmethod
    def forward(ctx, x, deviation, seed, offset):
        in_memory = isinstance(seed, Tensor)
        ctx.seed, ctx.offset = None if in_memory else seed, offset
        ctx.save_for_backward(*([seed] if in_memory else []))
        return _forward(x, deviation, Stream(seed, offset))

    @staticmethod
    def backward(ctx, dy):
        stream = Stream(*ctx.saved_tensors or (ctx.seed,), ctx.offset)
        needs_x, needs_deviation = ctx.needs_input_grad[:2]
        ddeviation = None
        if needs_deviation:
            if torch.is_grad_enabled() or not on_kernels(dy):
                eps = random.row_normals(*dy.shape, stream, device=dy.device)
                ddeviation = (dy * eps).sum(1).to(torch.float32)
            else:
                ddeviation = _backward(dy, stream)
        return dy if needs_x else None, ddeviation, None, None


@torch.library.custom_op("fastreg::row_noise", mutates_args=())
def _row_noise_op(x: Tensor, deviation: Tensor, seed: Tensor, offset: int) -> Tensor:
    return _forward(x, deviation, Stream(seed, offset))


@_row_noise_op.register_fake
def _(x, deviation, seed, offset):
    return x.new_empty(x.shape)


@torch.library.custom_op("fastreg::row_noise_backward", mutates_args=())
def _row_noise_backward_op(dy: Tensor, seed: Tensor, offset: int) -> Tensor:
    return _backward(dy, Stream(seed, offset))


@_row_noise_backward_op.register_fake
def _(dy, seed, offset):
    return dy.new_empty(dy.shape[0], dtype=torch.float32)


def _save(ctx, inputs, output):
    _, _, seed, ctx.offset = inputs
    ctx.save_for_backward(seed)


def _compiled_backward(ctx, dy):
    needs_x, needs_deviation = ctx.needs_input_grad[:2]
    ddeviation = _row_noise_backward_op(dy, *ctx.saved_tensors, ctx.offset) if needs_deviation else None
    return dy if needs_x else None, ddeviation, None, None


_row_noise_op.register_autograd(_compiled_backward, setup_context=_save)


def row_noise(x: Tensor, deviation: Tensor, seed=None, generator=None) -> Tensor:
    """x + deviation eps for x ``[rows, columns]`` and a deviation ``[rows]`` (fp32; fp64 for fp64)."""
    if not on_kernels(x, deviation) or x.numel() == 0:
        drawn = seed is not None or generator is not None
        return _definition(x, deviation, random.stream(x.device, seed, generator) if drawn else None)
    stream = random.stream(x.device, seed, generator)
    if torch.compiler.is_compiling():
        return _row_noise_op(x, deviation, stream.seed_on(x.device), stream.offset)
    return _RowNoise.apply(x, deviation, *stream)


# --- the public function ----------------------------------------------------------------------------------


def noisy_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    sigma: float | Tensor = 0.1,
    training: bool = True,
    *,
    kind: str = "additive",
    bias_sigma: float | Tensor | None = None,
    activation: str | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """activation of a linear layer whose weights are noisy in training: every example has noise of its own.

    =================  ==============================================  =============================================
    kind               weights of an example                           the sum
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
        activation: a name of ``fastreg.ops.fused.ACTIVATIONS``.
        seed, generator: as in :func:`fastreg.functional.dropout`.

    Returns: ``[*, outputs]``. In evaluation the layer has no noise.

    Raises:
        ValueError: an unknown kind or activation; a negative number for sigma or bias_sigma; a tensor of another shape.
        RuntimeError: torch's own of ``linear``, for shapes, dtypes and devices that do not fit.

    Source: Fortunato et al. 2018 (arXiv 1706.10295; there one draw serves a batch) for factorised noise; Kingma,
    Salimans, Welling 2015 (arXiv 1506.02557) for drawing it at the sums.
    """
    check_arguments(sigma, kind, bias_sigma, activation)
    if not training:
        return activated(F.linear(input, weight, bias), activation)
    input, weight, bias = cast_by_autocast(input, weight, bias)
    if torch_refuses(input, weight, bias):
        F.linear(input, weight, bias)  # raises
    _check_shapes(weight, sigma, kind, bias_sigma)
    v = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    if kind == "factorised":
        weight_sigma = _filled(sigma, weight, weight.shape)
        own = None if bias_sigma is None else _filled(bias_sigma, weight, weight.shape[:1])
        z = dual_linear.factorised_linear(v, weight, weight_sigma, bias, own, activation, seed, generator)
    elif kind == "multiplicative":
        sigma = sigma.reshape(()) if isinstance(sigma, Tensor) else sigma
        z = dual_linear.gaussian_linear(v, weight, bias, 1.0, sigma, activation, seed, generator)
    else:
        z = row_noise(F.linear(v, weight, bias), _deviation(v, sigma, bias_sigma), seed, generator)
        z = activated(z, activation)
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


def check_arguments(
    sigma: float | Tensor,
    kind: str = "additive",
    bias_sigma: float | Tensor | None = None,
    activation: str | None = None,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    for name, value in (("sigma", sigma), ("bias_sigma", bias_sigma)):
        if value is not None and not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} has to be at least 0, but got {value}")
    if kind == "multiplicative" and bias_sigma is not None:
        raise ValueError('kind="multiplicative" has no bias_sigma')
    check_activation(activation)


def _check_shapes(weight: Tensor, sigma, kind: str, bias_sigma) -> None:
    factorised = kind == "factorised"
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
