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
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.fused import activated, derivative, kept_of, needs_argument
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div, row_blocks
from fastreg.ops.linear.checks import on_kernels
from fastreg.ops.operator import apply, by_definition, empty_gradients, keep, kept, needs_definition, operator
from fastreg.random import Stream

if backend.HAS_TRITON:
    from fastreg.kernels import dual_linear as kernels

GAUSSIAN, FLIPOUT, FACTORISED = range(3)  # as in the kernels
SLOPE = 3
IN, OUT = 1, 2


class Form(NamedTuple):
    kind: int
    scale: float = 1.0
    fixed_sigma: float = 1.0  # where it is no tensor
    activation: str | None = None


def _further(stream: Stream, use: int) -> Stream:
    return Stream(stream.seed, stream.offset + (use << 32))


# --- in ATen ----------------------------------------------------------------------------------------------


def _factors(size: Sequence[int], stream: Stream | None, like: Tensor) -> Tensor:
    x = _normals(size, stream, like)
    return x.sign() * x.abs().sqrt()


def _normals(size: Sequence[int], stream: Stream | None, like: Tensor) -> Tensor:
    rows, columns = size
    if stream is None:
        return torch.randn(rows, columns, dtype=like.dtype, device=like.device)
    return random.row_normals(rows, columns, stream, dtype=like.dtype, device=like.device)


def _signs(size: Sequence[int], stream: Stream | None, like: Tensor) -> Tensor:
    rows, columns = size
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
    v, weight, bias, sigma, weight_sigma, bias_sigma, stream: Stream | None, form: Form
) -> Tensor:
    """Differentiable any number of times. Without a stream by torch's own random numbers, which a CPU makes faster."""
    size = len(v), len(weight)
    at = (lambda use: None) if stream is None else (lambda use: _further(stream, use))
    if form.kind == GAUSSIAN:
        b = root(squares(v, weight))
        noise = (form.fixed_sigma if sigma is None else sigma.to(b.dtype)) * b * _normals(size, at(OUT), b)
        z = (form.scale * F.linear(v, weight) + noise).to(v.dtype)
    elif form.kind == FLIPOUT:
        flipped = weight * _signs(weight.shape, at(0), weight)
        b = F.linear(v * _signs(v.shape, at(IN), v), flipped)
        z = form.scale * (F.linear(v, weight) + b * _signs(size, at(OUT), b))
    else:
        b = F.linear(v * _factors(v.shape, at(IN), v), weight_sigma, bias_sigma)
        z = F.linear(v, weight) + b * _factors(size, at(OUT), b)
    return activated(z if bias is None else z + bias, form.activation)


# --- launches ---------------------------------------------------------------------------------------------


def second_dtype(dtype: torch.dtype, kind: int) -> torch.dtype:
    """The dtype of v' and W': squares would leave the range of fp16."""
    return torch.bfloat16 if kind == GAUSSIAN and dtype == torch.float16 else dtype


def _draw(stream: Stream) -> dict:
    return {**number("seed", stream.seed, 0), "offset": stream.offset}


def _precision(x: Tensor) -> str:
    """Whether fp32 takes a product of TF32, or three."""
    return "tf32" if x.dtype == torch.float32 and backend.allows_tf32() else "tf32x3"


def _second(
    x: Tensor,
    y: Tensor,
    stream: Stream,
    form: Form,
    use: int,
    sigma: Tensor | None = None,
    root: Tensor | None = None,
    slope: Tensor | None = None,
    kept: Tensor | None = None,
    dz: Tensor | None = None,
) -> Launch:
    """y = x ∘ x, the noise of ``use`` times x, or with ``root`` the q of dz.

    With ``kept`` x is dy, what is kept for the activation makes dz of it, and y is made of that.
    """
    rows, columns = x.shape
    kind = form.kind if root is None else SLOPE
    block, blocks = row_blocks(columns)
    return Launch(
        kernels.second_input,
        (rows * blocks,),
        {
            "tensors": kernels.SecondInput(x, kept, dz, root, y, slope),
            **_draw(stream),
            **number("sigma", form.fixed_sigma if sigma is None else sigma, 0.0),
            "columns": columns,
            "blocks": blocks,
            "plan": kernels.SecondPlan(
                kind, use, None if kept is None else derivative(form.activation), block
            ),
            "num_warps": max(1, block // 256),
        },
    )


def _product(
    u: Tensor,
    u2: Tensor,
    weight: Tensor,
    weight_sigma: Tensor | None,
    z: Tensor,
    stream: Stream,
    form: Form,
    precision: str,
    *,
    bias: Tensor | None = None,
    bias_sigma: Tensor | None = None,
    sigma: Tensor | None = None,
    before: Tensor | None = None,
    root: Tensor | None = None,
    v: Tensor | None = None,
    transposed: bool = False,
) -> Launch:
    """z from u and u2; before and root are given what ``_forward`` says. Transposed: dv from dz and its second input,
    with the v of squares, and no activation."""
    (examples, columns), rows = u.shape, z.shape[1]
    block_rows, block_columns = 64, 128 // u.element_size()
    # fp32 has no registers for larger tiles: a product of it is three of TF32.
    most = 64 if u.element_size() == 2 else 32
    block_examples = next(block for block in (16, 32, 64) if block >= min(examples, most))
    # Larger tiles read v and v' less often, if there are enough of them for the GPU.
    tiles = ceil_div(examples, block_examples) * ceil_div(rows, 128)
    if u.element_size() == 2 and tiles >= 0.75 * backend.multiprocessors(u.device):
        block_rows = 128
    plan = kernels.Plan(
        kind=form.kind,
        rows=block_rows,
        columns=block_columns,
        examples=block_examples,
        precision=precision,
        transposed=transposed,
        even=rows % block_rows == 0 and columns % block_columns == 0,
        activation=None if transposed else form.activation,
    )
    return Launch(
        kernels.product,
        (ceil_div(examples, block_examples) * ceil_div(rows, block_rows),),
        {
            "operands": kernels.Operands(u, u2, weight, weight_sigma, v),
            "epilogue": kernels.Epilogue(bias, bias_sigma, z, before, root),
            **_draw(stream),
            **number("sigma", form.fixed_sigma if sigma is None else sigma, 0.0),
            "scale": form.scale,
            "shape": kernels.Shape(examples, rows, columns),
            "plan": plan,
            "num_warps": block_rows // 16,
        },
    )


def _weight_gradient(
    dz: Tensor,
    dz2: Tensor,
    v: Tensor,
    v2: Tensor,
    weight: Tensor,
    dweight: Tensor,
    stream: Stream,
    form: Form,
    precision: str,
) -> Launch:
    (examples, outputs), inputs = dz.shape, v.shape[1]
    block = 64
    return Launch(
        kernels.weight_gradient,
        (ceil_div(outputs, block) * ceil_div(inputs, block),),
        {
            "tensors": kernels.GradientTensors(dz, dz2, v, v2, weight, dweight),
            **_draw(stream),
            "scale": form.scale,
            "shape": kernels.GradientShape(examples, outputs, inputs),
            "plan": kernels.Plan(form.kind, block, block, 128 // dz.element_size(), precision),
            "num_warps": 4,
        },
    )


@planned
def forward_launches(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor | None,
    weight_sigma: Tensor | None,
    bias_sigma: Tensor | None,
    z: Tensor,
    before: Tensor | None,
    root: Tensor | None,
    stream: Stream,
    form: Form,
    precision: str,
) -> list[Launch]:
    """All contiguous. Workspace: the second input."""
    v2 = torch.empty_like(v, dtype=second_dtype(v.dtype, form.kind))
    more: dict[str, Any] = {"bias": bias, "bias_sigma": bias_sigma, "sigma": sigma}
    more |= {"before": before, "root": root}
    product = _product(v, v2, weight, weight_sigma, z, stream, form, precision, **more)
    return [_second(v, v2, stream, form, IN), product]


@planned
def backward_launches(
    dy: Tensor,
    v: Tensor,
    weight: Tensor,
    sigma: Tensor | None,
    weight_sigma: Tensor | None,
    root: Tensor | None,
    kept: Tensor | None,
    dz: Tensor,
    dz2: Tensor,
    slope: Tensor | None,
    dv: Tensor | None,
    v2: Tensor | None,
    dweight: Tensor | None,
    stream: Stream,
    form: Form,
    precision: str,
) -> list[Launch]:
    """All contiguous. Writes dz (which is dy where there is no activation), dz2, and what is given of those behind."""
    behind = None if kept is None else dz
    launches = [_second(dy, dz2, stream, form, OUT, sigma, root, slope, kept, behind)]
    if dv is not None:
        squared = v if form.kind == GAUSSIAN else None
        launches.append(
            _product(dz, dz2, weight, weight_sigma, dv, stream, form, precision, v=squared, transposed=True)
        )
    if v2 is not None:
        launches.append(_second(v, v2, stream, form, IN))
    if dweight is not None and v2 is not None:
        launches.append(_weight_gradient(dz, dz2, v, v2, weight, dweight, stream, form, precision))
    return launches


# --- operators --------------------------------------------------------------------------------------------


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@operator("fastreg::dual_linear", writes=["z", "before", "root"])
def _forward(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor | None,
    weight_sigma: Tensor | None,
    bias_sigma: Tensor | None,
    z: Tensor,
    before: Tensor | None,
    root: Tensor | None,
    stream: Stream,
    form: Form,
) -> None:
    """z, and where they are wanted before, which stands before the activation, and root, the square root of
    (W ∘ W)(v ∘ v) in fp32, for the gradients of the Gaussian: contiguous."""
    v, weight = v.contiguous(), weight.contiguous()
    bias, weight_sigma, bias_sigma = _contiguous(bias, weight_sigma, bias_sigma)
    forward_launches.run(
        v, weight, bias, sigma, weight_sigma, bias_sigma, z, before, root, stream, form, _precision(v)
    )


@operator(
    "fastreg::dual_linear_backward",
    writes=["dv", "dweight", "dbias", "dsigma", "dweight_sigma", "dbias_sigma"],
)
def _backward(
    dy: Tensor,
    v: Tensor,
    weight: Tensor,
    sigma: Tensor | None,
    weight_sigma: Tensor | None,
    root: Tensor | None,
    y_or_before: Tensor | None,
    dv: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dsigma: Tensor | None,
    dweight_sigma: Tensor | None,
    dbias_sigma: Tensor | None,
    stream: Stream,
    form: Form,
) -> None:
    """The gradients: contiguous; None where they are not wanted. y_or_before: what the activation has kept."""
    dy, v, weight = dy.contiguous(), v.contiguous(), weight.contiguous()
    (weight_sigma,) = _contiguous(weight_sigma)
    factorised = form.kind == FACTORISED
    dz = dy if y_or_before is None else torch.empty_like(dy)
    second = second_dtype(v.dtype, form.kind)
    dz2 = torch.empty_like(dz, dtype=second)
    of_kernel = None if factorised else dweight
    v2 = slope = None
    if of_kernel is not None or dweight_sigma is not None:
        v2 = torch.empty_like(v, dtype=second)
    if dsigma is not None:
        slope = dz.new_empty(len(dz) * row_blocks(dz.shape[1])[1], dtype=torch.float32)
    if dz is not dy or any(t is not None for t in (dv, dweight, dsigma, dweight_sigma, dbias_sigma)):
        backward_launches.run(
            dy, v, weight, sigma, weight_sigma, root, y_or_before, dz, dz2, slope, dv, v2, of_kernel,
            stream, form, _precision(v),
        )  # fmt: skip
    if dbias is not None:
        torch.sum(dz, 0, out=dbias)
    if dsigma is not None and slope is not None:
        dsigma.copy_(slope.sum())
    if dbias_sigma is not None:
        torch.sum(dz2, 0, out=dbias_sigma)
    # Behind the factors these have no noise in common, and so are a matrix library's.
    if factorised and dweight is not None:
        torch.mm(dz.t(), v, out=dweight)
    if dweight_sigma is not None and v2 is not None:
        torch.mm(dz2.t(), v2, out=dweight_sigma)


# --- autograd ---------------------------------------------------------------------------------------------


class _Dual(torch.autograd.Function):
    """Saves the inputs, the stream, the root of the Gaussian, and what the derivative of the activation needs: the
    result, or its argument."""

    @staticmethod
    def forward(ctx, v, weight, bias, sigma, weight_sigma, bias_sigma, seed, offset, form):
        inputs, stream = (v, weight, bias, sigma, weight_sigma, bias_sigma), Stream(seed, offset)
        recorded = any(ctx.needs_input_grad)
        z = v.new_empty(v.shape[0], weight.shape[0])
        before = torch.empty_like(z) if recorded and needs_argument(form.activation) else None
        root = torch.empty_like(z, dtype=torch.float32) if recorded and form.kind == GAUSSIAN else None
        _forward(*inputs, z, before, root, stream, form)
        ctx.form = form
        keep(ctx, stream, *inputs, root, kept_of(z, before, form.activation))
        return z

    @staticmethod
    def backward(ctx, dy):
        stream, *inputs, root, y_or_before = kept(ctx)
        if needs_definition(dy):
            found = by_definition(partial(_definition, stream=stream, form=ctx.form), inputs, dy)
        else:
            v, weight, _, sigma, weight_sigma, _ = inputs
            found = empty_gradients(ctx, inputs)
            _backward(dy, v, weight, sigma, weight_sigma, root, y_or_before, *found, stream, ctx.form)
        return *found, None, None, None


# --- the functions ----------------------------------------------------------------------------------------


def _dual(v, weight, bias, sigma, weight_sigma, bias_sigma, form: Form, seed, generator) -> Tensor:
    tensors = v, weight, bias, sigma, weight_sigma, bias_sigma
    # A row is a program at least.
    ours = on_kernels(*tensors) and v.shape[0] <= backend.MOST_PROGRAMS
    if ours and v.numel() != 0 and weight.numel() != 0:
        return apply(_Dual, *tensors, *random.stream(v.device, seed, generator), form)
    # What no seed has to agree with takes torch's own random numbers.
    drawn = random.is_wanted(seed, generator)
    stream = random.stream(v.device, seed, generator) if drawn else None
    return _definition(*tensors, stream, form)


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
    form = Form(GAUSSIAN, scale, 1.0 if tensor is not None else float(sigma), activation)
    return _dual(v, weight, bias, tensor, None, None, form, seed, generator)


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
    form = Form(FLIPOUT, scale, activation=activation)
    return _dual(v, weight, bias, None, None, None, form, seed, generator)


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
    form = Form(FACTORISED, activation=activation)
    return _dual(v, weight, bias, None, weight_sigma, bias_sigma, form, seed, generator)
