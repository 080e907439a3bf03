"""Layer normalization, alone and behind a residual branch: y = f(LN(h) + residual), h = skip + D(x).

Two backends: the Triton kernels of ``kernels/layer_norm.py`` (CUDA) and the definition in ATen (CPU, ``torch.func``
transforms, second derivatives). Kept for backward are h (x itself, where nothing stands before the normalization) and
two numbers a row.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.arguments import is_number, plain, plain_shape
from fastreg.ops.backend import Launch, number
from fastreg.ops.dropout import checked_p, dropout
from fastreg.ops.fused import (
    activated,
    autocast_dtype,
    check_activation,
    check_residual,
    result_dtype,
    sum_dtype,
)
from fastreg.ops.layout import ceil_div
from fastreg.random import LANE_VALUES, Stream

if backend.HAS_TRITON:
    from fastreg.kernels import layer_norm as kernels

ATEN_BELOW = 1 << 18
"""Plain layer normalization of fewer elements goes to ATen: its kernel then takes about the time of its launch, so
there is nothing to gain, and a launch of ours costs more on the host. (An estimate, to be measured.)"""

ROW_BYTES = 1 << 16  # a row up to this size is held in registers
SUMMED_COLUMNS = 8192  # with its sums for the parameters beside it, up to this length
LONG_BLOCK = 8192  # columns of a chunk of a longer row


class _Form(NamedTuple):
    """What distinguishes one layer normalization from another."""

    columns: int  # of a row: what is normalized together
    eps: float
    dtype: torch.dtype  # of the result
    activation: str | None = None
    threshold: int = 0  # D drops where lane < threshold; 0 drops nothing
    scale: float = 1.0


class _Wanted(NamedTuple):
    """The dtype of each gradient, None where it is not wanted."""

    x: torch.dtype | None = None
    skip: torch.dtype | None = None
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    residual: torch.dtype | None = None


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


def _arguments(rows: int, blocks: _Blocks, stream: Stream, form: _Form) -> dict:
    """The arguments that forward and backward kernels share."""
    return {
        **number("seed", stream.seed, 0),
        "offset": stream.offset,
        "threshold": form.threshold,
        "scale": form.scale,
        "rows": rows,
        "vectors": form.columns // blocks.vector,
        "DROP": form.threshold > 0,
        "ACTIVATION": form.activation,
        "EVEN_ROWS": rows % blocks.rows == 0,
        "EVEN_COLUMNS": form.columns % blocks.columns == 0,
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_COLUMNS": blocks.columns,
        "VECTOR": blocks.vector,
        "WIDE": rows * form.columns >= 1 << 31,
        "num_warps": blocks.warps,
        # Said, or the assembler may spill to fit more programs, which memory does not need.
        "maxnreg": 128,
    }


def _without(arguments: dict, *names: str) -> dict:
    return {name: value for name, value in arguments.items() if name not in names}


def _forward_launch(tensors: dict, stream: Stream, form: _Form) -> Launch:
    """tensors: the pointer arguments by name, contiguous."""
    x = tensors["x_ptr"]
    rows = x.numel() // form.columns
    if form.columns * x.element_size() > ROW_BYTES:
        arguments = _arguments(rows, _long_blocks(x, form.columns, 1, LONG_BLOCK), stream, form)
        arguments = _without(arguments, "BLOCK_ROWS", "EVEN_ROWS")
        return Launch(kernels.forward_long, (rows,), tensors | {"eps": form.eps} | arguments)
    blocks = _blocks(x, form.columns, 32)
    arguments = _arguments(rows, blocks, stream, form)
    return Launch(kernels.forward, (ceil_div(rows, blocks.rows),), tensors | {"eps": form.eps} | arguments)


_GRADIENTS = ("dx_ptr", "dskip_ptr", "dresidual_ptr")
_Sums = tuple[Tensor | None, Tensor | None]  # where the gradients of weight and bias go


def _backward_launches(tensors: dict, sums: _Sums, stream: Stream, form: _Form) -> list[Launch]:
    """tensors: the pointer arguments by name, contiguous, without the partial sums, which are made here."""
    h = tensors["h_ptr"]
    rows = h.numel() // form.columns
    narrow = form.columns * h.element_size() % 16 != 0
    long = 2 * form.columns * h.element_size() > (ROW_BYTES // 4 if narrow else ROW_BYTES)  # h and dy
    together = not long and form.columns <= SUMMED_COLUMNS
    launches = []
    if any(tensors[name] is not None for name in _GRADIENTS):
        if long:
            blocks = _long_blocks(h, form.columns, 1, LONG_BLOCK)
            arguments = _without(_arguments(rows, blocks, stream, form), "BLOCK_ROWS", "EVEN_ROWS")
            launches.append(Launch(kernels.backward_long, (rows,), tensors | arguments))
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
            arguments = _arguments(rows, blocks, stream, form) | {"maxnreg": registers}
            launches.append(Launch(kernels.backward, (programs,), tensors | partial | arguments))
    if any(t is not None for t in sums):
        if not launches or not together:
            launches.append(_columns_launch(tensors, sums, stream, form))
        launches.append(_sum_launch(launches[-1].arguments, sums))
    return launches


def _columns_launch(tensors: dict, sums: _Sums, stream: Stream, form: _Form) -> Launch:
    """The partial sums alone."""
    h = tensors["h_ptr"]
    rows = h.numel() // form.columns
    vector = math.gcd(16 // h.element_size(), form.columns)
    columns = min(32 * vector, max(vector, 1 << (form.columns - 1).bit_length()))
    blocks = _Blocks(max(1, 2048 // columns), columns, vector, 4)
    column_blocks = ceil_div(form.columns, columns)
    most = ceil_div(4 * backend.multiprocessors(h.device), column_blocks)
    programs = min(ceil_div(ceil_div(rows, blocks.rows), 4), most)
    arguments = _arguments(rows, blocks, stream, form)
    arguments = _without(arguments, "seed_ptr", "seed", "offset", "threshold", "scale", "DROP")
    tensors = _without(tensors, "dh_ptr", *_GRADIENTS) | _partial(h, programs, form, sums)
    return Launch(kernels.backward_columns, (column_blocks, programs), tensors | arguments)


def _partial(h: Tensor, programs: int, form: _Form, sums: _Sums) -> dict:
    """Where the programs leave their sums: one buffer, so that one kernel adds them up."""
    count = sum(t is not None for t in sums)
    parts = torch.empty(count, programs, form.columns, dtype=sum_dtype(h.dtype), device=h.device).unbind()
    return {
        "dweight_ptr": None if sums[0] is None else parts[0],
        "dbias_ptr": None if sums[1] is None else parts[-1],
    }


def _sum_launch(partials: dict, sums: _Sums) -> Launch:
    """partials: what ``_partial`` made, among other arguments."""
    first = next(partials[name] for name in ("dweight_ptr", "dbias_ptr") if partials[name] is not None)
    results = [t for t in sums if t is not None]
    programs, columns = first.shape
    arguments = {
        "partial_ptr": first.as_strided((len(results), *first.shape), (first.numel(), *first.stride())),
        "first_ptr": results[0],
        "second_ptr": results[1] if len(results) > 1 else None,
        "programs": programs,
        "columns": columns,
        "BLOCK_ROWS": 64,
        "BLOCK_COLUMNS": 32,
        "WIDE": programs * columns >= 1 << 31,
        "num_warps": 8,
    }
    return Launch(kernels.sum_partials, (ceil_div(columns, 32), len(results)), arguments)


def _contiguous(**tensors: Tensor | None) -> dict:
    return {f"{name}_ptr": None if t is None else t.contiguous() for name, t in tensors.items()}


def _run_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stream: Stream,
    form: _Form,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, h (None where that is x) and the statistics of the rows: mean and rstd, fp32 (fp64) [2, rows]."""
    y = torch.empty(x.shape, dtype=form.dtype, device=x.device)
    h = None
    if skip is not None or form.threshold:
        h = torch.empty(x.shape, dtype=result_dtype(x.dtype, skip), device=x.device)
    statistics = torch.empty(2, x.numel() // form.columns, dtype=sum_dtype(x.dtype), device=x.device)
    tensors = _contiguous(
        x=x, skip=skip, h=h, weight=weight, bias=bias, residual=residual, y=y, statistics=statistics
    )
    if x.numel():
        _forward_launch(tensors, stream, form).run(x.device)
    return y, h, statistics


def _run_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    stream: Stream,
    form: _Form,
    wanted: _Wanted,
) -> list[Tensor | None]:
    """The wanted gradients, in the order of ``_Wanted``. h: what forward returned, or its x."""
    shapes = (h.shape, h.shape, (form.columns,), (form.columns,), h.shape)
    gradients = [
        None if dtype is None else torch.empty(shape, dtype=dtype, device=h.device)
        for shape, dtype in zip(shapes, wanted, strict=True)
    ]
    dx, dskip, dweight, dbias, dresidual = gradients
    if h.numel() == 0:
        return [None if g is None else g.zero_() for g in gradients]
    if form.activation is None:
        bias = residual = None
    tensors = _contiguous(
        dy=dy, dh=dh, h=h, weight=weight, bias=bias, residual=residual, statistics=statistics,
        dx=dx, dskip=dskip, dresidual=dresidual,
    )  # fmt: skip
    for launch in _backward_launches(tensors, (dweight, dbias), stream, form):
        launch.run(h.device)
    return gradients


# --- autograd, eager --------------------------------------------------------------------------------------


def _wanted(needs: Sequence[bool], dtypes: Sequence[torch.dtype | None], form: _Form) -> _Wanted:
    """What the kernels have to write: not what equals another gradient."""
    wanted = _Wanted(*(dtype if need else None for need, dtype in zip(needs, dtypes, strict=False)))
    if form.activation is None:
        wanted = wanted._replace(residual=None)  # it is dy
    if form.threshold == 0 and wanted.x == wanted.skip:
        wanted = wanted._replace(skip=None)  # it is dx
    return wanted


def _shared(
    gradients: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor, dtypes, weight_shape
) -> tuple:
    """All gradients, from what the kernels wrote."""
    dx, dskip, dweight, dbias, dresidual = gradients
    if needs[1] and dskip is None:
        dskip = dx
    if needs[4] and dresidual is None:
        dresidual = dy.to(dtypes[4])
    dweight, dbias = (None if g is None else g.view(weight_shape) for g in (dweight, dbias))
    return dx, dskip, dweight, dbias, dresidual


class _LayerNorm(torch.autograd.Function):
    """The eager path to the kernels. Returns y, and h where that is not x."""

    @staticmethod
    def forward(ctx, x, skip, weight, bias, residual, normalized_shape, seed, offset, form):
        y, h, statistics = _run_forward(x, skip, weight, bias, residual, Stream(seed, offset), form)
        ctx.set_materialize_grads(False)
        ctx.form, ctx.offset, ctx.normalized_shape = form, offset, normalized_shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, skip, weight, bias, residual)]
        seed_tensor = seed if isinstance(seed, Tensor) else None
        ctx.seed = seed if seed_tensor is None else None
        ctx.save_for_backward(
            x if h is None else h,  # an output as well, so that second derivatives find their way to x
            weight,
            bias,
            None if form.activation is None else residual,
            statistics,
            seed_tensor,
        )
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        if dy is None and dh is None:
            return (None,) * 9
        h, weight, bias, residual, statistics, seed = ctx.saved_tensors
        stream = Stream(ctx.seed if seed is None else seed, ctx.offset)
        form, needs = ctx.form, ctx.needs_input_grad[:5]
        if dy is None:
            dy = torch.zeros_like(dh, dtype=form.dtype)
        # Not on the kernels: second derivatives, and batched gradients (vmap).
        if (
            torch.is_grad_enabled()
            or not backend.runs_kernels(dy)
            or not (dh is None or backend.runs_kernels(dh))
        ):
            gradients = _differentiable_backward(
                dy, dh, h, weight, bias, residual, stream, form, needs, ctx.dtypes, ctx.normalized_shape
            )
        else:
            wanted = _wanted(needs, ctx.dtypes, form)
            gradients = _run_backward(dy, dh, h, weight, bias, residual, statistics, stream, form, wanted)
            gradients = _shared(gradients, needs, dy, ctx.dtypes, ctx.normalized_shape)
        return (*gradients, None, None, None, None)


def _differentiable_backward(
    dy, dh, h, weight, bias, residual, stream, form, needs, dtypes, normalized_shape
):
    """The gradients in ATen, for second derivatives (create_graph=True) and batched gradients."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that two arguments which were one tensor have gradients of their own.
        h, weight, bias, residual = (
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (h, weight, bias, residual)
        )
        y = _definition(h, normalized_shape, weight, bias, form.eps, form.activation, residual).to(form.dtype)
    inputs = [t for t in (h, weight, bias, residual) if t is not None]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=create_graph))
    dskip, dweight, dbias, dresidual = (
        None if t is None else next(found) for t in (h, weight, bias, residual)
    )
    if dh is not None:
        dskip = dskip + dh
    dx = dskip
    if form.threshold:
        keep = random.keep_mask(h.shape, form.threshold / LANE_VALUES, stream, h.device)
        dx = torch.where(keep, dx, 0.0) * form.scale
    if form.activation is None:
        dresidual = dy
    gradients = (dx, dskip, dweight, dbias, dresidual)
    return [g.to(dtype) if need else None for g, need, dtype in zip(gradients, needs, dtypes, strict=True)]


# --- registered operators, for torch.compile --------------------------------------------------------------
# Dynamo meets these; an eager call does not pay for the dispatcher.


@torch.library.custom_op("fastreg::layer_norm", mutates_args=())
def _layer_norm_op(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    columns: int,
    eps: float,
    dtype: torch.dtype,
    activation: str | None,
    threshold: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    form = _Form(columns, eps, dtype, activation, threshold, scale)
    stream = Stream(0 if seed is None else seed)
    y, h, statistics = _run_forward(x, skip, weight, bias, residual, stream, form)
    return y, x.new_empty(0) if h is None else h, statistics


@_layer_norm_op.register_fake
def _(x, skip, weight, bias, residual, seed, columns, eps, dtype, activation, threshold, scale):
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = x.new_empty(0)
    if skip is not None or threshold:
        h = torch.empty(x.shape, dtype=result_dtype(x.dtype, skip), device=x.device)
    return y, h, torch.empty(2, x.numel() // columns, dtype=sum_dtype(x.dtype), device=x.device)


@torch.library.custom_op("fastreg::layer_norm_backward", mutates_args=())
def _layer_norm_backward_op(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    seed: Tensor | None,
    columns: int,
    eps: float,
    dtype: torch.dtype,
    activation: str | None,
    threshold: int,
    scale: float,
    dx: torch.dtype | None,
    dskip: torch.dtype | None,
    dweight: torch.dtype | None,
    dbias: torch.dtype | None,
    dresidual: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The wanted gradients, those whose dtype is given; the others are empty."""
    form = _Form(columns, eps, dtype, activation, threshold, scale)
    wanted = _Wanted(dx, dskip, dweight, dbias, dresidual)
    stream = Stream(0 if seed is None else seed)
    found = _run_backward(dy, dh, h, weight, bias, residual, statistics, stream, form, wanted)
    return tuple(h.new_empty(0) if gradient is None else gradient for gradient in found)


@_layer_norm_backward_op.register_fake
def _(
    dy, dh, h, weight, bias, residual, statistics, seed,
    columns, eps, dtype, activation, threshold, scale, *wanted,
):  # fmt: skip
    shapes = (h.shape, h.shape, (columns,), (columns,), h.shape)
    return tuple(
        h.new_empty(0) if dtype is None else torch.empty(shape, dtype=dtype, device=h.device)
        for shape, dtype in zip(shapes, wanted, strict=True)
    )


def _save_for_compiled_backward(ctx, inputs, output):
    x, skip, weight, bias, residual, seed, *fields = inputs
    _, h, statistics = output
    ctx.form = form = _Form(*fields)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, skip, weight, bias, residual)]
    ctx.normalized_shape = next((t.shape for t in (weight, bias) if t is not None), None)
    ctx.is_x = skip is None and not form.threshold
    h = x if ctx.is_x else h
    residual = None if form.activation is None else residual
    ctx.save_for_backward(h, weight, bias, residual, statistics, seed)
    ctx.set_materialize_grads(False)  # where h is not used, nothing is to be read for its gradient


def _compiled_backward(ctx, dy, dh, _):
    h, weight, bias, residual, statistics, seed = ctx.saved_tensors
    form, needs = ctx.form, ctx.needs_input_grad[:5]
    if dy is None:
        dy = torch.zeros_like(h, dtype=form.dtype)
    dh = None if ctx.is_x else dh  # the gradient of a placeholder
    wanted = _wanted(needs, ctx.dtypes, form)
    found = _layer_norm_backward_op(dy, dh, h, weight, bias, residual, statistics, seed, *form, *wanted)
    gradients = [None if dtype is None else gradient for gradient, dtype in zip(found, wanted, strict=True)]
    return *_shared(gradients, needs, dy, ctx.dtypes, ctx.normalized_shape), *[None] * (1 + len(form))


_layer_norm_op.register_autograd(_compiled_backward, setup_context=_save_for_compiled_backward)


# --- the public functions ---------------------------------------------------------------------------------


def _runs_kernels(
    input: Tensor,
    shape: tuple[int, ...] | None,
    eps: float,
    others: Sequence[Tensor | None],
    *parameters: Tensor | None,
) -> bool:
    """Whether the kernels take these arguments. What does not fit goes to ATen, which says why not."""
    if shape is None or not is_number(eps) or not backend.runs_kernels(input):
        return False
    double = input.dtype == torch.float64
    return (
        len(shape) > 0
        and tuple(input.shape[-len(shape) :]) == shape
        and input.numel() > 0
        and all(t is None or tuple(t.shape) == shape for t in parameters)
        and all(
            t is None
            or (t.device == input.device and backend.runs_kernels(t) and (t.dtype == torch.float64) == double)
            for t in (*others, *parameters)
        )
    )


def _on_kernels(input, skip, weight, bias, residual, shape, stream, form):
    """y, and h or None where that is ``input``."""
    if not torch.compiler.is_compiling():
        return _LayerNorm.apply(input, skip, weight, bias, residual, shape, *stream, form)
    seed = stream.seed_on(input.device) if form.threshold else None
    y, h, _ = _layer_norm_op(input, skip, weight, bias, residual, seed, *form)
    return y, h


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
        activation: one of ``ACTIVATIONS``, with torch's default parameters.
        residual: shape of the input. The result has the promoted dtype of both.

    Under autocast on a GPU the result is fp32, as torch's is, while the input is read as it is.

    Raises:
        ValueError: unknown activation; a residual that does not fit.
        RuntimeError: torch's own, for shapes and dtypes that do not fit.

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """
    check_activation(activation)
    check_residual(input, residual)
    shape, epsilon = plain_shape(normalized_shape), plain(eps)
    ours = _runs_kernels(input, shape, epsilon, (residual,), weight, bias)
    if ours and (
        activation is not None
        or residual is not None
        or backend.worth_a_launch(input, ATEN_BELOW)
        # which ATen refuses on a GPU
        or any(t is not None and t.dtype != input.dtype for t in (weight, bias))
    ):
        dtype = result_dtype(autocast_dtype(input), residual)
        form = _Form(math.prod(shape), float(epsilon), dtype, activation)
        return _on_kernels(input, None, weight, bias, residual, shape, Stream(0), form)[0]
    return activated(F.layer_norm(input, normalized_shape, weight, bias, eps), activation, residual)


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    eps: float = 1e-5,
    *,
    prenorm: bool = False,
    activation: str | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The seam between two blocks of a transformer, one pass each way: h = residual + dropout(input), then LN(h).

    Args:
        input: output of a block, ``[*, *normalized_shape]``.
        residual: the stream it is added to, shape of the input, or None.
        normalized_shape, weight, bias, eps: as in :func:`layer_norm`.
        p, training: as in :func:`fastreg.functional.dropout`. No mask is stored.
        prenorm: return h as well, which the next block is added to.
        activation: of the normalized values; one of ``ACTIVATIONS``.
        seed: int, or int64 tensor of one element: the mask is then that of :mod:`fastreg.random` on every device.
        generator: draws the seed, instead of torch's default generator.

    Returns: y = activation(LN(h)) in the dtype of the input, or (y, h) with h in the promoted dtype of input and
    residual: a stream in fp32 beside 16-bit blocks stays in fp32, and y is what the next block takes.

    Raises: as :func:`layer_norm` and :func:`fastreg.functional.dropout`.

    Source: pre-norm and post-norm blocks, Xiong et al. 2020 (arXiv 2002.04745).
    """
    check_activation(activation)
    check_residual(input, residual)
    if type(p) is not float or type(training) is not bool or not 0.0 <= p <= 1.0:
        p = checked_p(input, p, training)
    shape, epsilon = plain_shape(normalized_shape), plain(eps)
    threshold = random.threshold(p) if training else 0
    if (
        threshold < LANE_VALUES
        and (threshold or residual is not None)
        and _runs_kernels(input, shape, epsilon, (residual,), weight, bias)
        and input.is_contiguous()  # the mask counts in memory order, the kernel in rows
    ):
        stream = random.stream(input.device, seed, generator) if threshold else Stream(0)
        form = _Form(
            math.prod(shape),
            float(epsilon),
            input.dtype,
            activation,
            threshold,
            LANE_VALUES / (LANE_VALUES - threshold),
        )
        y, h = _on_kernels(input, residual, weight, bias, None, shape, stream, form)
        return (y, h) if prenorm else y
    h = dropout(input, p, training, residual=residual, seed=seed, generator=generator)
    if _runs_kernels(h, shape, epsilon, (), weight, bias):
        form = _Form(math.prod(shape), float(epsilon), input.dtype, activation)
        y, _ = _on_kernels(h, None, weight, bias, None, shape, Stream(0), form)
    else:
        y = _definition(h, normalized_shape, weight, bias, eps, activation, None).to(input.dtype)
    return (y, h) if prenorm else y
