"""Linear layers with noise in their weights by two dense products: every example its own noise, and none in memory.

    gaussian_linear      scale Wv + sigma sqrt((W ∘ W)(v ∘ v)) eps + bias        DropConnect and multiplicative noise
    flipout_linear       scale (Wv + r ∘ (S ∘ W)(s ∘ v)) + bias                  DropConnect with p = 1/2
    factorised_linear    Wv + e_out ∘ (Sigma (e_in ∘ v)) + bias + bias_sigma ∘ e_out      noisy networks

One function, ``_Dual``, in three kinds, on two backends: the kernels of ``kernels/dual_linear.py``, and ATen (CPU,
fp64, second derivatives, ``torch.func``) with the same noise. The noise is that of ``fastreg.random``: eps and the
factors are ``row_normals``, the signs ``signs``; those of W under the stream itself, of an example and an input one
stream further on, of an example and an output two.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.fused import (
    activated,
    derivative,
    differentiated,
    gradient_for_kernels,
    kept_of,
    needs_argument,
)
from fastreg.ops.layout import ceil_div
from fastreg.random import Stream

if backend.HAS_TRITON:
    from fastreg.kernels import dual_linear as kernels

GAUSSIAN, FLIPOUT, FACTORISED = range(3)  # as in the kernels
SLOPE = 3
IN, OUT = 1, 2


class _Form(NamedTuple):
    kind: int
    scale: float = 1.0
    sigma: float = 1.0  # where it is no tensor


def _further(stream: Stream, use: int) -> Stream:
    return Stream(stream.seed, stream.offset + (use << 32))


# --- in ATen ----------------------------------------------------------------------------------------------


def _factors(rows: int, columns: int, stream: Stream | None, like: Tensor) -> Tensor:
    x = _normals(rows, columns, stream, like)
    return x.sign() * x.abs().sqrt()


def _normals(rows: int, columns: int, stream: Stream | None, like: Tensor) -> Tensor:
    if stream is None:
        return torch.randn(rows, columns, dtype=like.dtype, device=like.device)
    return random.row_normals(rows, columns, stream, dtype=like.dtype, device=like.device)


def _signs(rows: int, columns: int, stream: Stream | None, like: Tensor) -> Tensor:
    if stream is None:
        return torch.randint(2, (rows, columns), dtype=like.dtype, device=like.device).mul_(2).sub_(1)
    return random.signs(rows, columns, stream, dtype=like.dtype, device=like.device)


def root(x: Tensor) -> Tensor:
    """sqrt(x) with a slope of 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), torch.where(x == 0, 0.0, x))


def squares(v: Tensor, weight: Tensor) -> Tensor:
    """(W ∘ W)(v ∘ v), in fp32 at least: the square of 1e-4 is no fp16 number."""
    wide = torch.promote_types(v.dtype, torch.float32)
    with contextlib.nullcontext() if v.is_meta else torch.autocast(v.device.type, enabled=False):
        return F.linear(v.to(wide).square(), weight.to(wide).square())


def _definition(
    v, weight, bias, sigma, weight_sigma, bias_sigma, stream: Stream | None, form: _Form
) -> Tensor:
    """Differentiable any number of times. Without a stream by torch's own random numbers, which a CPU makes faster."""
    examples, outputs = len(v), len(weight)
    at = (lambda use: None) if stream is None else (lambda use: _further(stream, use))
    if form.kind == GAUSSIAN:
        b = root(squares(v, weight))
        noise = (
            (form.sigma if sigma is None else sigma.to(b.dtype)) * b * _normals(examples, outputs, at(OUT), b)
        )
        z = (form.scale * F.linear(v, weight) + noise).to(v.dtype)
    elif form.kind == FLIPOUT:
        flipped = weight * _signs(*weight.shape, at(0), weight)
        b = F.linear(v * _signs(*v.shape, at(IN), v), flipped)
        z = form.scale * (F.linear(v, weight) + b * _signs(examples, outputs, at(OUT), b))
    else:
        b = F.linear(v * _factors(*v.shape, at(IN), v), weight_sigma, bias_sigma)
        z = F.linear(v, weight) + b * _factors(examples, outputs, at(OUT), b)
    return z if bias is None else z + bias


# --- launches ---------------------------------------------------------------------------------------------


def row_blocks(columns: int) -> tuple[int, int]:
    """Of an elementwise pass over rows: columns of a program, and how many of these blocks a row has."""
    block = min(1024, max(64, 1 << (columns - 1).bit_length()))
    return block, ceil_div(columns, block)


def _second_dtype(dtype: torch.dtype, kind: int) -> torch.dtype:
    """Of v' and W': squares are no fp16 numbers."""
    return torch.bfloat16 if kind == GAUSSIAN and dtype == torch.float16 else dtype


def _draw(stream: Stream) -> dict:
    return {**number("seed", stream.seed, 0), "offset": stream.offset}


def _precision() -> str:
    return "tf32" if backend.allows_tf32() else "tf32x3"


def second_launch(
    x, y, stream, form: _Form, use: int, sigma=None, square_root=None, slope=None,
    kept=None, dz=None, activation=None,
) -> Launch:  # fmt: skip
    """y = x ∘ x, the noise of ``use`` times x, or with ``square_root`` the q of dz.

    With an activation x is dy, what is kept of the forward pass makes dz of it, and y is made of that.
    """
    rows, columns = x.shape
    kind = form.kind if square_root is None else SLOPE
    block, blocks = row_blocks(columns)
    return Launch(
        kernels.second_input,
        (rows * blocks,),
        {
            "x_ptr": x,
            "kept_ptr": kept,
            "dz_ptr": dz,
            "root_ptr": square_root,
            "y_ptr": y,
            "slope_ptr": slope,
            **_draw(stream),
            **number("sigma", form.sigma if sigma is None else sigma, 0.0),
            "columns": columns,
            "blocks": blocks,
            "KIND": kind,
            "USE": use,
            "DERIVATIVE": derivative(activation),
            "BLOCK": block,
            "num_warps": max(1, block // 256),
        },
    )


def product_launch(
    u,
    u2,
    weight,
    weight_sigma,
    v,
    bias,
    bias_sigma,
    z,
    before,
    square_root,
    stream,
    form,
    sigma,
    activation,
    transposed,
) -> Launch:
    (examples, columns), rows = u.shape, z.shape[1]
    block_rows, block_columns = 64, 128 // u.element_size()
    # fp32 has no registers for larger tiles: a product of it is three of TF32.
    most = 64 if u.element_size() == 2 else 32
    block_examples = next(block for block in (16, 32, 64) if block >= min(examples, most))
    # Larger tiles read v and v' less often, if there are enough of them for the GPU.
    tiles = ceil_div(examples, block_examples) * ceil_div(rows, 128)
    if u.element_size() == 2 and tiles >= 0.75 * backend.multiprocessors(u.device):
        block_rows = 128
    return Launch(
        kernels.product,
        (ceil_div(examples, block_examples) * ceil_div(rows, block_rows),),
        {
            "u_ptr": u,
            "u2_ptr": u2,
            "w_ptr": weight,
            "w2_ptr": weight_sigma,
            "v_ptr": v,
            "bias_ptr": bias,
            "bias_sigma_ptr": bias_sigma,
            "z_ptr": z,
            "before_ptr": before,
            "root_ptr": square_root,
            **_draw(stream),
            **number("sigma", form.sigma if sigma is None else sigma, 0.0),
            "scale": form.scale,
            "examples": examples,
            "rows": rows,
            "columns": columns,
            "KIND": form.kind,
            "TRANSPOSED": transposed,
            "ACTIVATION": activation,
            "PRECISION": _precision(),
            "EVEN": rows % block_rows == 0 and columns % block_columns == 0,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
            "BLOCK_EXAMPLES": block_examples,
            "num_warps": block_rows // 16,
        },
    )


def weight_gradient_launch(dz, dz2, v, v2, weight, dweight, stream, form) -> Launch:
    (examples, outputs), inputs = dz.shape, v.shape[1]
    block = 64
    return Launch(
        kernels.weight_gradient,
        (ceil_div(outputs, block) * ceil_div(inputs, block),),
        {
            "dz_ptr": dz,
            "dz2_ptr": dz2,
            "v_ptr": v,
            "v2_ptr": v2,
            "w_ptr": weight,
            "dw_ptr": dweight,
            **_draw(stream),
            "scale": form.scale,
            "examples": examples,
            "outputs": outputs,
            "inputs": inputs,
            "KIND": form.kind,
            "PRECISION": _precision(),
            "BLOCK_OUTPUTS": block,
            "BLOCK_INPUTS": block,
            "BLOCK_EXAMPLES": 128 // dz.element_size(),
            "num_warps": 4,
        },
    )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward(v, weight, bias, sigma, weight_sigma, bias_sigma, stream, form, activation, keep, keep_root):
    """The result; with ``keep`` what stands before the activation; with ``keep_root`` the fp32 square root of
    (W ∘ W)(v ∘ v), for the gradients of the Gaussian. None where they are not wanted."""
    v, weight, bias, weight_sigma, bias_sigma = _contiguous(v, weight, bias, weight_sigma, bias_sigma)
    z = v.new_empty(len(v), len(weight))
    before = torch.empty_like(z) if keep else None
    square_root = torch.empty_like(z, dtype=torch.float32) if keep_root else None
    v2 = torch.empty_like(v, dtype=_second_dtype(v.dtype, form.kind))
    second_launch(v, v2, stream, form, IN).run(v.device)
    product_launch(
        v,
        v2,
        weight,
        weight_sigma,
        None,
        bias,
        bias_sigma,
        z,
        before,
        square_root,
        stream,
        form,
        sigma,
        activation,
        False,
    ).run(v.device)
    return z, before, square_root


def _backward(dy, v, weight, sigma, weight_sigma, square_root, kept, activation, stream, form, needs):
    """The wanted of the gradients of v, weight, bias, sigma, weight_sigma and bias_sigma; None for the others."""
    needs_v, needs_weight, needs_bias, needs_sigma, needs_weight_sigma, needs_bias_sigma = needs
    dy, v, weight, weight_sigma = _contiguous(dy, v, weight, weight_sigma)
    second = _second_dtype(v.dtype, form.kind)
    dv = dweight = dbias = dsigma = dweight_sigma = dbias_sigma = None
    dz = dy if activation is None else torch.empty_like(dy)
    if dz is not dy or any((needs_v, needs_weight, needs_sigma, needs_weight_sigma, needs_bias_sigma)):
        dz2 = torch.empty_like(dz, dtype=second)
        slope = None
        if form.kind == GAUSSIAN and needs_sigma:
            slope = dz.new_empty(len(dz) * row_blocks(dz.shape[1])[1], dtype=torch.float32)
        second_launch(dy, dz2, stream, form, OUT, sigma, square_root, slope, kept, dz, activation).run(
            dz.device
        )
    if needs_bias:
        dbias = dz.sum(0)
    if needs_sigma:
        dsigma = slope.sum().view(sigma.shape).to(sigma.dtype)
    if needs_v:
        dv = torch.empty_like(v)
        own = v if form.kind == GAUSSIAN else None
        product_launch(
            dz, dz2, weight, weight_sigma, own, None, None, dv, None, None, stream, form, None, None, True
        ).run(dz.device)
    if needs_bias_sigma:
        dbias_sigma = dz2.sum(0)
    if needs_weight and form.kind == FACTORISED:
        dweight = dz.t() @ v  # with nothing in common, and no mask: a matrix library's
    if (needs_weight and form.kind != FACTORISED) or needs_weight_sigma:
        v2 = torch.empty_like(v, dtype=second)
        second_launch(v, v2, stream, form, IN).run(dz.device)
        if needs_weight_sigma:
            dweight_sigma = dz2.t() @ v2
        else:
            dweight = torch.empty_like(weight)
            weight_gradient_launch(dz, dz2, v, v2, weight, dweight, stream, form).run(dz.device)
    return dv, dweight, dbias, dsigma, dweight_sigma, dbias_sigma


# --- autograd ---------------------------------------------------------------------------------------------


class _Dual(torch.autograd.Function):
    """The result, and what stands before its activation, if the derivative of that needs it: one of the two is saved,
    by which second derivatives come back to this function."""

    @staticmethod
    def forward(ctx, v, weight, bias, sigma, weight_sigma, bias_sigma, seed, offset, form, activation):
        ctx.set_materialize_grads(False)
        in_memory = isinstance(seed, Tensor)
        z, before, square_root = _forward(
            v,
            weight,
            bias,
            sigma,
            weight_sigma,
            bias_sigma,
            Stream(seed, offset),
            form,
            activation,
            keep=needs_argument(activation),
            keep_root=form.kind == GAUSSIAN,
        )
        ctx.seed, ctx.offset, ctx.form = None if in_memory else seed, offset, form
        ctx.activation = activation
        kept = kept_of(z, before, activation)
        ctx.save_for_backward(
            v, weight, sigma, weight_sigma, bias_sigma, square_root, kept, seed if in_memory else None
        )
        return z, before

    @staticmethod
    def backward(ctx, dy, dbefore):
        if dy is None and dbefore is None:
            return (None,) * 10
        v, weight, sigma, weight_sigma, bias_sigma, square_root, kept, seed = ctx.saved_tensors
        stream, form = Stream(ctx.seed if seed is None else seed, ctx.offset), ctx.form
        needs = ctx.needs_input_grad[:6]
        dy, activation = gradient_for_kernels(dy, dbefore, kept, ctx.activation)
        if torch.is_grad_enabled() or not on_kernels(dy, v, weight):
            inputs = (v, weight, sigma, weight_sigma, bias_sigma)
            found = _differentiable_backward(dy, inputs, stream, form, needs)
        else:
            rest = (square_root, kept, activation, stream, form, needs)
            found = _backward(dy, v, weight, sigma, weight_sigma, *rest)
        return *found, None, None, None, None


def _differentiable_backward(dz, inputs, stream, form, needs):
    """For second derivatives and batched gradients: those of the definition."""
    create = torch.is_grad_enabled()
    needs_v, needs_weight, needs_bias, *others = needs
    needs = (needs_v, needs_weight, *others)
    with torch.enable_grad():
        v, weight, sigma, weight_sigma, bias_sigma = all_ = [
            t.detach().requires_grad_() if needed and not t.requires_grad else t
            for t, needed in zip(inputs, needs, strict=True)
        ]
        z = _definition(v, weight, None, sigma, weight_sigma, bias_sigma, stream, form)
    wanted = [t for t, needed in zip(all_, needs, strict=True) if needed]
    found = iter(())
    if wanted:
        found = iter(torch.autograd.grad(z, wanted, dz, create_graph=create, allow_unused=True))
    dv, dweight, *rest = (next(found) if needed else None for needed in needs)
    return dv, dweight, dz.sum(0) if needs_bias else None, *rest


# --- registered operators, for torch.compile --------------------------------------------------------------


@torch.library.custom_op("fastreg::dual_linear", mutates_args=())
def _dual_op(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor | None,
    weight_sigma: Tensor | None,
    bias_sigma: Tensor | None,
    seed: Tensor,
    offset: int,
    kind: int,
    scale: float,
    sigma_number: float,
    activation: str | None,
    keep: bool,
    keep_root: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_forward``, with empty tensors for None."""
    form, stream = _Form(kind, scale, sigma_number), Stream(seed, offset)
    z, before, square_root = _forward(
        v, weight, bias, sigma, weight_sigma, bias_sigma, stream, form, activation, keep, keep_root
    )
    if before is None:
        before = z.new_empty(0)
    if square_root is None:
        square_root = z.new_empty(0, dtype=torch.float32)
    return z, before, square_root


@_dual_op.register_fake
def _(
    v, weight, bias, sigma, weight_sigma, bias_sigma, seed, offset, kind, scale, sigma_number,
    activation, keep, keep_root,
):  # fmt: skip
    z = v.new_empty(v.shape[0], weight.shape[0])
    root = z.new_empty(z.shape if keep_root else (0,), dtype=torch.float32)
    return z, z.new_empty(z.shape if keep else (0,)), root


@torch.library.custom_op("fastreg::dual_linear_backward", mutates_args=())
def _dual_backward_op(
    dy: Tensor,
    v: Tensor,
    weight: Tensor,
    sigma: Tensor | None,
    weight_sigma: Tensor | None,
    square_root: Tensor,
    kept: Tensor | None,
    seed: Tensor,
    offset: int,
    kind: int,
    scale: float,
    sigma_number: float,
    activation: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The wanted gradients; the others are empty."""
    form, stream = _Form(kind, scale, sigma_number), Stream(seed, offset)
    square_root = square_root if kind == GAUSSIAN else None
    found = _backward(dy, v, weight, sigma, weight_sigma, square_root, kept, activation, stream, form, needs)
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in found)


@_dual_backward_op.register_fake
def _(dy, v, weight, sigma, weight_sigma, square_root, kept, seed, offset, kind, scale, number, name, needs):
    like = (v, weight, dy[0], sigma, weight_sigma, dy[0])
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else dy.new_empty(0)
        for t, needed in zip(like, needs, strict=True)
    )


def _save_for_compiled_backward(ctx, inputs, output):
    v, weight, _, sigma, weight_sigma, _, seed, *ctx.rest, _, _ = inputs
    z, before, square_root = output
    ctx.mark_non_differentiable(before, square_root)
    kept = kept_of(z, before, ctx.rest[-1])
    ctx.save_for_backward(v, weight, sigma, weight_sigma, square_root, kept, seed)


def _compiled_backward(ctx, dy, *_):
    needs = ctx.needs_input_grad[:6]
    found = _dual_backward_op(dy, *ctx.saved_tensors, *ctx.rest, list(needs))
    found = (t if needed else None for t, needed in zip(found, needs, strict=True))
    return *found, None, *[None] * len(ctx.rest), None, None


_dual_op.register_autograd(_compiled_backward, setup_context=_save_for_compiled_backward)


# --- the functions ----------------------------------------------------------------------------------------


def on_kernels(*tensors: Tensor | None) -> bool:
    """A row is a program at least."""
    return all(
        t is None
        or (
            backend.runs_kernels(t)
            and t.dtype != torch.float64
            and t.shape[:1].numel() <= backend.MOST_PROGRAMS
        )
        for t in tensors
    )


def _dual(v, weight, bias, sigma, weight_sigma, bias_sigma, form, activation, seed, generator) -> Tensor:
    tensors = (v, weight, bias, sigma, weight_sigma, bias_sigma)
    if not on_kernels(*tensors) or v.numel() == 0 or weight.numel() == 0:
        # What no seed has to agree with takes torch's own random numbers.
        drawn = random.is_wanted(seed, generator)
        stream = random.stream(v.device, seed, generator) if drawn else None
        return activated(_definition(*tensors, stream, form), activation)
    stream = random.stream(v.device, seed, generator)
    recorded = differentiated(*tensors)
    if torch.compiler.is_compiling():
        seed, keep = stream.seed_on(v.device), recorded and needs_argument(activation)
        root = recorded and form.kind == GAUSSIAN
        return _dual_op(*tensors, seed, stream.offset, *form, activation, keep, root)[0]
    if recorded:
        return _Dual.apply(*tensors, *stream, form, activation)[0]
    return _forward(*tensors, stream, form, activation, keep=False, keep_root=False)[0]


def gaussian_linear(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    sigma: float | Tensor,
    activation: str | None = None,
    seed=None,
    generator=None,
) -> Tensor:
    """activation(scale Wv + sigma sqrt((W ∘ W)(v ∘ v)) eps + bias). v: ``[examples, inputs]``; sigma: a number, or a
    tensor of one element, which has a gradient."""
    tensor = sigma if isinstance(sigma, Tensor) else None
    form = _Form(GAUSSIAN, scale, 1.0 if tensor is not None else float(sigma))
    return _dual(v, weight, bias, tensor, None, None, form, activation, seed, generator)


def flipout_linear(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    activation: str | None = None,
    seed=None,
    generator=None,
) -> Tensor:
    """activation(scale (Wv + r ∘ (S ∘ W)(s ∘ v)) + bias). v: ``[examples, inputs]``."""
    return _dual(v, weight, bias, None, None, None, _Form(FLIPOUT, scale), activation, seed, generator)


def factorised_linear(
    v: Tensor,
    weight: Tensor,
    weight_sigma: Tensor,
    bias: Tensor | None,
    bias_sigma: Tensor | None,
    activation: str | None = None,
    seed=None,
    generator=None,
) -> Tensor:
    """activation(Wv + e_out ∘ (Sigma (e_in ∘ v)) + bias + bias_sigma ∘ e_out). v: ``[examples, inputs]``."""
    return _dual(
        v, weight, bias, None, weight_sigma, bias_sigma, _Form(FACTORISED), activation, seed, generator
    )
