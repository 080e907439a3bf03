"""Layer normalization, alone and behind a branch of a transformer: y = f(LN(h) + residual), h = skip + D(x).

Two backends: the Triton kernels of ``kernels/layer_norm.py`` (CUDA) and the definition in ATen (CPU, ``torch.func``
transforms, second derivatives). Kept for backward are h (x itself, where nothing stands before the normalization) and
two numbers a row.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.arguments import is_number, plain, plain_shape
from fastreg.ops.backend import Launch, number
from fastreg.ops.checks import check_activation, check_residual, checked_p
from fastreg.ops.dropout import dropout
from fastreg.ops.fused import activated, autocast_dtype, result_dtype, sum_dtype
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div
from fastreg.ops.operator import (
    apply,
    by_definition,
    keep,
    kept,
    leave_undefined,
    needs_definition,
    operator,
)
from fastreg.ops.partial_sums import sum_launch
from fastreg.random import LANE_VALUES, Stream

if backend.HAS_TRITON:
    from fastreg.kernels import layer_norm as kernels

ROW_BYTES = 1 << 16  # a row up to this size is held in registers
SUMMED_COLUMNS = 8192  # with its sums for the parameters beside it, up to this length
LONG_BLOCK = 8192  # columns of a chunk of a longer row


class Form(NamedTuple):
    """What distinguishes one layer normalization from another."""

    columns: int  # of a row: what is normalized together
    eps: float
    dtype: torch.dtype  # of the result
    activation: str | None = None
    threshold: int = 0  # D drops where lane < threshold; 0 drops nothing
    scale: float = 1.0


# --- the definition, in ATen ------------------------------------------------------------------------------


def _definition(
    h: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """f(LN(h) + residual) for any mixture of dtypes, computed in the widest: ATen itself allows few."""
    dtype = h.dtype
    for parameter in (weight, bias):
        dtype = result_dtype(dtype, parameter)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return activated(F.layer_norm(h.to(dtype), normalized_shape, weight, bias, eps), activation, residual)


# --- the launch -------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    rows: int
    columns: int
    vector: int  # elements of one 16-byte access, or what divides a row
    warps: int


def _blocks(x: Tensor, columns: int, a_thread: int) -> _Blocks:
    """The tile of a program: whole rows, 2,048 elements or one row, ``a_thread`` in a thread of at most 16 warps."""
    vector = math.gcd(16 // x.element_size(), columns)
    block = max(vector, 1 << (columns - 1).bit_length())
    rows = max(1, 2048 // block)
    return _Blocks(rows, block, vector, min(16, max(1, rows * block // (32 * a_thread))))


def _long_blocks(x: Tensor, columns: int, rows: int, block: int) -> _Blocks:
    """The tile of a program that takes ``block`` columns of a row at a time."""
    return _Blocks(
        rows, block, math.gcd(16 // x.element_size(), columns), min(16, max(1, rows * block // 512))
    )


def _arguments(rows: int, blocks: _Blocks, form: Form) -> dict[str, Any]:
    """The arguments that all kernels share."""
    return {
        "rows": rows,
        "vectors": form.columns // blocks.vector,
        "plan": kernels.Plan(
            drop=form.threshold > 0,
            activation=form.activation,
            rows=blocks.rows,
            columns=blocks.columns,
            vector=blocks.vector,
            even_rows=rows % blocks.rows == 0,
            even_columns=form.columns % blocks.columns == 0,
            wide=rows * form.columns >= 1 << 31,
        ),
        "num_warps": blocks.warps,
        # Said, or the assembler may spill to fit more programs, which memory does not need.
        "maxnreg": 128,
    }


def _draw(stream: Stream, form: Form) -> dict[str, Any]:
    return {
        **number("seed", stream.seed, 0),
        "offset": stream.offset,
        "threshold": form.threshold,
        "scale": form.scale,
    }


@planned
def forward_launches(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    statistics: Tensor,
    stream: Stream,
    form: Form,
) -> list[Launch]:
    """All contiguous."""
    rows = x.numel() // form.columns
    long = form.columns * x.element_size() > ROW_BYTES
    blocks = _long_blocks(x, form.columns, 1, LONG_BLOCK) if long else _blocks(x, form.columns, 32)
    arguments = {
        "tensors": kernels.Forward(x, skip, h, residual, y, statistics),
        "affine": kernels.Affine(weight, bias),
        **_draw(stream, form),
        "eps": form.eps,
        **_arguments(rows, blocks, form),
    }
    kernel = kernels.forward_long if long else kernels.forward
    return [Launch(kernel, (ceil_div(rows, blocks.rows),), arguments)]


_Sums = tuple[Tensor | None, Tensor | None]  # where the gradients of weight and bias go


@planned
def backward_launches(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    dx: Tensor | None,
    dskip: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    stream: Stream,
    form: Form,
) -> list[Launch]:
    """All contiguous. Workspace: partial sums for the parameters."""
    if form.activation is None:
        bias = residual = None
    tensors = {
        "tensors": kernels.Backward(dy, dh, h, residual, statistics),
        "affine": kernels.Affine(weight, bias),
    }
    written = {"gradients": kernels.Gradients(dx, dskip, dresidual), **_draw(stream, form)}
    sums = dweight, dbias
    rows = h.numel() // form.columns
    narrow = form.columns * h.element_size() % 16 != 0
    long = 2 * form.columns * h.element_size() > (ROW_BYTES // 4 if narrow else ROW_BYTES)  # h and dy
    together = not long and form.columns <= SUMMED_COLUMNS
    launches = []
    if any(t is not None for t in (dx, dskip, dresidual)):
        if long:
            arguments = _arguments(rows, _long_blocks(h, form.columns, 1, LONG_BLOCK), form)
            launches.append(Launch(kernels.backward_long, (rows,), tensors | written | arguments))
        else:
            # 16 elements a thread, so that the sums have registers beside them, and 16 warps on a multiprocessor.
            # Narrow accesses, fp64 and activations need more registers than that leaves: 8 warps, and no spills.
            blocks = _blocks(h, form.columns, 16)
            crowded = narrow or h.dtype == torch.float64 or form.activation is not None
            # Four row blocks a program at least, so that its sums are a small part of the traffic.
            most = backend.multiprocessors(h.device) * max(1, (8 if crowded else 16) // blocks.warps)
            programs = min(ceil_div(ceil_div(rows, blocks.rows), 4), most)
            partial = _partial(h, programs, form, sums if together else (None, None))
            registers = 255 if crowded and blocks.warps <= 8 else 128
            arguments = _arguments(rows, blocks, form) | {"sums": partial, "maxnreg": registers}
            launches.append(Launch(kernels.backward, (programs,), tensors | written | arguments))
    if any(t is not None for t in sums):
        if not launches or not together:
            launches.append(_columns_launch(tensors, h, sums, form))
        launches.append(_sum_launch(launches[-1].arguments["sums"], sums))
    return launches


def _columns_launch(tensors: dict[str, Any], h: Tensor, sums: _Sums, form: Form) -> Launch:
    """The partial sums alone."""
    rows = h.numel() // form.columns
    vector = math.gcd(16 // h.element_size(), form.columns)
    columns = min(32 * vector, max(vector, 1 << (form.columns - 1).bit_length()))
    blocks = _Blocks(max(1, 2048 // columns), columns, vector, 4)
    column_blocks = ceil_div(form.columns, columns)
    most = ceil_div(4 * backend.multiprocessors(h.device), column_blocks)
    programs = min(ceil_div(ceil_div(rows, blocks.rows), 4), most)
    arguments = tensors | {"sums": _partial(h, programs, form, sums)} | _arguments(rows, blocks, form)
    return Launch(kernels.backward_columns, (column_blocks, programs), arguments)


def _partial(h: Tensor, programs: int, form: Form, sums: _Sums) -> Any:
    """Where the programs leave their sums: one buffer, so that one kernel adds them up."""
    count = sum(t is not None for t in sums)
    parts = torch.empty(count, programs, form.columns, dtype=sum_dtype(h.dtype), device=h.device).unbind()
    return kernels.Sums(
        None if sums[0] is None else parts[0],
        None if sums[1] is None else parts[-1],
    )


def _sum_launch(partial: Any, sums: _Sums) -> Launch:
    """partial: what ``_partial`` made."""
    first = next(t for t in partial if t is not None)
    results = [t for t in sums if t is not None]
    both = first.as_strided((len(results), *first.shape), (first.numel(), *first.stride()))
    return sum_launch(both, *results)


# --- operators --------------------------------------------------------------------------------------------


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@operator("fastreg::layer_norm", writes=["y", "h", "statistics"])
def _forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    statistics: Tensor,
    stream: Stream,
    form: Form,
) -> None:
    """y, h, statistics: contiguous. h: None where that is x. statistics: mean and rstd, fp32 (fp64) [2, rows]."""
    if x.numel():
        inputs = _contiguous(x, skip, weight, bias, residual)
        forward_launches.run(*inputs, y, h, statistics, stream, form)


@operator("fastreg::layer_norm_backward", writes=["dx", "dskip", "dweight", "dbias", "dresidual"])
def _backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    dx: Tensor | None,
    dskip: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    stream: Stream,
    form: Form,
) -> None:
    """h: forward's, or its x. bias, residual: forward's, where the activation needs them. What is written: contiguous,
    None where it is not wanted."""
    gradients = dx, dskip, dweight, dbias, dresidual
    if h.numel():
        inputs = _contiguous(dy, dh, h, weight, bias, residual)
        backward_launches.run(*inputs, statistics, *gradients, stream, form)
    else:
        for g in gradients:
            if g is not None:
                g.zero_()


# --- autograd ---------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    """Returns y, and h or None where that is x."""

    @staticmethod
    def forward(ctx, x, skip, weight, bias, residual, shape, seed, offset, form, prenorm):
        y, h = _empty_like(x, form.dtype), None
        if skip is not None or form.threshold:
            h = _empty_like(x, result_dtype(x.dtype, skip))
        statistics = torch.empty(2, x.numel() // form.columns, dtype=sum_dtype(x.dtype), device=x.device)
        stream = Stream(seed, offset)
        _forward(x, skip, weight, bias, residual, y, h, statistics, stream, form)
        ctx.form, ctx.shape = form, shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, skip, weight, bias, residual)]
        kept_residual = None if form.activation is None else residual
        keep(ctx, stream, x if h is None else h, weight, bias, kept_residual, statistics)
        leave_undefined(ctx)
        # Eager, h is always an output, so that second derivatives find their way to x.
        return y, h if prenorm or not torch.compiler.is_compiling() else None

    @staticmethod
    def backward(ctx, dy, dh):
        nothing = (None,) * 5
        if dy is None and dh is None:
            return nothing + nothing
        stream, h, weight, bias, residual, statistics = kept(ctx)
        if dy is None:
            dy = torch.zeros_like(dh, dtype=ctx.form.dtype)
        if needs_definition(dy, dh):
            return *_gradients_by_definition(ctx, dy, dh, h, weight, bias, residual, stream), *nothing
        return *_gradients(ctx, dy, dh, h, weight, bias, residual, statistics, stream), *nothing


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _gradients(ctx, dy, dh, h, weight, bias, residual, statistics, stream):
    """Gradients of x, skip, weight, bias and residual. Equal gradients are one tensor."""
    form = ctx.form
    wanted = [dtype if need else None for need, dtype in zip(ctx.needs_input_grad, ctx.dtypes, strict=False)]
    residual_dtype = wanted[4]
    one = form.threshold == 0 and wanted[0] == wanted[1]
    if one:
        wanted[1] = None
    if form.activation is None:
        wanted[4] = None
    parameter = bias if weight is None else weight
    gradients = [
        None if dtype is None else _empty_like(t, dtype)
        for t, dtype in zip((h, h, parameter, parameter, h), wanted, strict=True)
    ]
    if any(g is not None for g in gradients):
        _backward(dy, dh, h, weight, bias, residual, statistics, *gradients, stream, form)
    if one:
        gradients[1] = gradients[0]
    if form.activation is None and residual_dtype is not None:
        gradients[4] = dy.to(residual_dtype)
    return gradients


def _gradients_by_definition(ctx, dy, dh, h, weight, bias, residual, stream):
    """``_gradients`` in ATen."""
    form = ctx.form

    def y(h, weight, bias, residual):
        return _definition(h, ctx.shape, weight, bias, form.eps, form.activation, residual).to(form.dtype)

    dskip, dweight, dbias, dresidual = by_definition(y, (h, weight, bias, residual), dy)
    dx = dskip = dskip if dh is None else dskip + dh
    if form.threshold:
        mask = random.keep_mask(h.shape, form.threshold / LANE_VALUES, stream, h.device)
        dx = torch.where(mask, dx, 0.0) * form.scale
    if form.activation is None:
        dresidual = dy
    gradients = (dx, dskip, dweight, dbias, dresidual)
    return [
        g.to(dtype) if need else None
        for g, need, dtype in zip(gradients, ctx.needs_input_grad, ctx.dtypes, strict=False)
    ]


# --- the public functions ---------------------------------------------------------------------------------


def _runs_kernels(
    input: Tensor,
    shape: tuple[int, ...],
    eps: float,
    other: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Whether the kernels take these arguments. What does not fit goes to ATen, which says why not.

    other: of the shape of the input.
    """
    if not shape or not is_number(eps) or not backend.runs_kernels(input):
        return False
    if input.shape[-len(shape) :] != shape or input.numel() == 0:
        return False
    for t in (weight, bias):
        if t is not None and t.shape != shape:
            return False
    double = input.dtype == torch.float64
    for t in (other, weight, bias):
        if t is not None and not (backend.goes_with(t, input) and (t.dtype == torch.float64) == double):
            return False
    return True


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(LN(input) + residual), one pass each way; drop-in for :func:`torch.nn.functional.layer_norm`.

    Args:
        input: floating point, ``[*, *normalized_shape]``, any strides. The result is contiguous, as torch's is.
        normalized_shape: sizes of the dimensions that are normalized together, the last ones.
        weight, bias: ``normalized_shape``. May be fp32 beside a 16-bit input.
        eps: added to the variance.
        activation: a name of ``fastreg.functional.ACTIVATIONS``, with torch's default parameters.
        residual: added to what the operation itself gives: after the dropout, or before the activation of a norm. Shape
            of the input; the result has the promoted dtype of both.

    Under autocast on a GPU the result is fp32, as torch's is, while the input is read as it is.

    Raises:
        ValueError: unknown activation; a residual that does not fit.
        RuntimeError: torch's own, for shapes and dtypes that do not fit.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """
    check_activation(activation)
    check_residual(input, residual)
    shape, epsilon = plain_shape(normalized_shape) or (), plain(eps)
    ours = _runs_kernels(input, shape, epsilon, residual, weight, bias)
    if ours and (
        activation is not None
        or residual is not None
        or backend.worth_a_launch(input, "layer_norm")
        # which ATen refuses on a GPU
        or any(t is not None and t.dtype != input.dtype for t in (weight, bias))
    ):
        dtype = result_dtype(autocast_dtype(input), residual)
        form = Form(math.prod(shape), float(epsilon), dtype, activation)
        return apply(_LayerNorm, input, None, weight, bias, residual, shape, *Stream(0), form, False)[0]
    return activated(F.layer_norm(input, normalized_shape, weight, bias, eps), activation, residual)


def dropout_add_layer_norm(
    input: Tensor,
    skip: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    p: float = 0.5,
    training: bool = True,
    *,
    prenorm: bool = False,
    activation: str | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The seam between two blocks of a transformer, one pass each way: h = skip + dropout(input), then LN(h).

    Args:
        input: output of a block, ``[*, *normalized_shape]``.
        skip: the stream of the transformer, which passes by the block: shape of the input, or None.
        normalized_shape, weight, bias, eps: as in :func:`layer_norm`.
        p, training: as in :func:`fastreg.functional.dropout`. No mask is stored.
        prenorm: return h as well, which the next block is added to.
        activation: of the normalized values: a name of ``fastreg.functional.ACTIVATIONS``.
        seed: int, or int64 tensor of one element: the mask is then that of :mod:`fastreg.random` on every device.
        generator: draws the seed, instead of torch's default generator.

    Returns: y = activation(LN(h)) in the dtype of the input, or (y, h) with h in the promoted dtype of input and
    skip: a stream in fp32 beside 16-bit blocks stays in fp32, and y is what the next block takes.

    Raises: as :func:`layer_norm` and :func:`fastreg.functional.dropout`.

    Source: pre-norm and post-norm blocks, Xiong et al. 2020 (arXiv 2002.04745).
    """
    check_activation(activation)
    check_residual(input, skip, "skip")
    if type(p) is not float or type(training) is not bool or not 0.0 <= p <= 1.0:
        p = checked_p(input, p, training)
    shape, epsilon = plain_shape(normalized_shape) or (), plain(eps)
    threshold = random.threshold(p) if training else 0
    if (
        threshold < LANE_VALUES
        and (threshold or skip is not None)
        and _runs_kernels(input, shape, epsilon, skip, weight, bias)
        and input.is_contiguous()  # the mask counts in memory order, the kernel in rows
    ):
        stream = random.stream(input.device, seed, generator) if threshold else Stream(0)
        form = Form(
            math.prod(shape),
            float(epsilon),
            input.dtype,
            activation,
            threshold,
            LANE_VALUES / (LANE_VALUES - threshold),
        )
        y, h = apply(_LayerNorm, input, skip, weight, bias, None, shape, *stream, form, prenorm)
        return (y, h) if prenorm else y
    h = dropout(input, p, training, residual=skip, seed=seed, generator=generator)
    if _runs_kernels(h, shape, epsilon, None, weight, bias):
        form = Form(math.prod(shape), float(epsilon), input.dtype, activation)
        y, _ = apply(_LayerNorm, h, None, weight, bias, None, shape, *Stream(0), form, False)
    else:
        y = _definition(h, normalized_shape, weight, bias, eps, activation, None).to(input.dtype)
    return (y, h) if prenorm else y
