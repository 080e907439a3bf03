"""Dropout in all its forms, fused with bias, activation and residual: y = D(f(x + bias)) + residual.

Every form is one function, ``_dropout``, on two backends: the Triton kernels of ``kernels/dropout.py`` (CUDA) and
the definition in ATen (CPU, ``torch.func`` transforms, second derivatives). Neither stores a mask.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastreg import random
from fastreg.ops import backend
from fastreg.ops.backend import Launch, number
from fastreg.ops.checks import check_activation, check_leaf, check_residual, check_same_device, checked_p
from fastreg.ops.fused import ACTIVATIONS, derivative, result_dtype, sum_dtype
from fastreg.ops.launch import planned
from fastreg.ops.layout import Tiling, ceil_div, dense, dense_strides, empty_dense, tiling, with_strides
from fastreg.ops.operator import apply, by_definition, keep, kept, needs_definition, operator
from fastreg.ops.partial_sums import sum_launch
from fastreg.random import LANE_VALUES, Stream

if backend.HAS_TRITON:
    from fastreg.kernels import dropout as kernels


class Form(NamedTuple):
    """What distinguishes one dropout from another: y = D(f(x + bias)) + residual."""

    threshold: int  # drop where lane < threshold; 0 drops nothing
    scale: float
    kept_shift: float | None = None
    dropped_value: float | None = None
    mask_dims: int = 0  # one draw an element (0), a sample (1: first dimension) or a channel (2: first two)
    bias_dim: int | None = None
    activation: str | None = None

    @property
    def keeps_input(self) -> bool:
        """Whether the backward pass needs the input: only an activation does."""
        return self.activation is not None


# --- the definition, in ATen ------------------------------------------------------------------------------


def _before_mask(x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if bias is not None:
        x = x + bias.to(x.dtype)
    return x if activation is None else ACTIVATIONS[activation](x)


def _mask(
    size: torch.Size, stride: tuple[int, ...], form: Form, stream: Stream, device: torch.device
) -> Tensor:
    """The keep mask of a tensor with these dense strides, broadcast to it: elements count in memory order."""
    drawn_size = size[: form.mask_dims] if form.mask_dims else size
    drawn = random.lanes(torch.arange(drawn_size.numel(), dtype=torch.int64, device=device), stream)
    if form.mask_dims:
        drawn = drawn.view(*drawn_size, *[1] * (len(size) - form.mask_dims))
    else:
        drawn = drawn.as_strided(size, stride)
    return drawn >= form.threshold


def _masked(v: Tensor, keep: Tensor | None, form: Form) -> Tensor:
    if keep is not None:
        if form.kept_shift is not None:
            return torch.where(keep, v * form.scale + form.kept_shift, form.dropped_value or 0.0)
        v = torch.where(keep, v, 0.0)
    return v if form.scale == 1 else v * form.scale


def _definition(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, stream: Stream | None, form: Form
) -> Tensor:
    keep = None
    if form.threshold:
        assert stream is not None
        keep = _mask(x.shape, dense_strides(x), form, stream, x.device)
    y = _masked(_before_mask(x, bias, form.activation), keep, form)
    return y if residual is None else y + residual


# --- the launch -------------------------------------------------------------------------------------------


def tiled(x: Tensor, form: Form) -> Tensor:
    """``x`` in a dense layout that the kernels can tile: itself wherever possible."""
    if x.is_contiguous():
        return x
    x = dense(x)
    return x.contiguous() if tiling(x, form.mask_dims, form.bias_dim) is None else x


def _tiles(x: Tensor, form: Form) -> Tiling:
    """How a tensor is tiled that ``tiled`` has laid out."""
    tiles = tiling(x, form.mask_dims, form.bias_dim)
    assert tiles is not None
    return tiles


def _blocks(x: Tensor, tiles: Tiling) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and the elements of a vector: one 16-byte access, or what divides a row.

    4,096 elements, 32 a thread, where there are enough of them to fill a GPU, else 1,024. A tile is no wider than one
    access of all its threads, so that a thread holds whole columns and sums them over the rows without any other.
    """
    vector = 16 // x.element_size()
    if tiles.rows is not None:
        vector = math.gcd(vector, tiles.columns)
    size = 4096 if x.numel() >= 1 << 20 and vector > 1 else 1024
    if tiles.rows is None:
        return 1, size, vector
    columns = max(vector, min(1 << (tiles.columns - 1).bit_length(), 128 * vector))  # a power of 2
    return max(1, size // columns), columns, vector


def _arguments(tiles: Tiling, blocks: tuple[int, int, int], stream: Stream, form: Form) -> dict:
    """The arguments that forward and backward kernels share."""
    rows, columns, vector = blocks
    tail = tiles.columns % vector
    whole = tiles.columns - tail
    return {
        **number("seed", stream.seed, 0),
        "offset": stream.offset,
        "threshold": form.threshold,
        "scale": form.scale,
        "view": kernels.View(
            tiles.rows, tiles.columns // vector, tiles.mask_repeat, tiles.bias_repeat, tiles.bias_size
        ),
        "tail": tail,
        "plan": kernels.Plan(
            mask=tiles.mask if form.threshold else None,
            bias=tiles.bias,
            activation=form.activation,
            rows=rows,
            columns=columns,
            vector=vector,
            even=whole > 0 and whole % columns == 0 and (tiles.rows or 1) % rows == 0,
            wide=(tiles.rows or 1) * tiles.columns >= 1 << 31,
            ragged=tail > 0,
        ),
        "num_warps": 4,
        "maxnreg": 128,  # without it the assembler may spill to fit more programs, which memory does not need
    }


def _block_counts(tiles: Tiling, blocks: tuple[int, int, int]) -> tuple[int, int]:
    rows, columns, vector = blocks
    # One block of columns at least: the first takes the elements behind the last whole vector.
    return ceil_div(tiles.rows or 1, rows), max(1, ceil_div(tiles.columns // vector * vector, columns))


@planned
def forward_launches(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, stream: Stream, form: Form
) -> list[Launch]:
    """x, residual, y: dense, with one layout that can be tiled."""
    tiles = _tiles(x, form)
    blocks = _blocks(x, tiles)
    arguments = _arguments(tiles, blocks, stream, form)
    arguments |= {
        "tensors": kernels.Forward(x, bias, residual, y),
        "kept_shift": form.kept_shift or 0.0,
        "dropped_value": form.dropped_value or 0.0,
        "plan": arguments["plan"]._replace(shifted=form.kept_shift is not None),
    }
    return [Launch(kernels.forward, (math.prod(_block_counts(tiles, blocks)),), arguments)]


@planned
def backward_launches(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    dx: Tensor,
    stream: Stream,
    form: Form,
    dbias: Tensor | None,
) -> list[Launch]:
    """dy, x, dx: dense, with one layout that can be tiled. dbias: [bias size]; where the bias varies along the rows,
    the workspace has partial sums for it."""
    tiles = _tiles(dx, form)
    blocks = _blocks(dx, tiles)
    row_blocks, column_blocks = _block_counts(tiles, blocks)
    sums: dict[str, Any] = {"dtype": sum_dtype(dx.dtype), "device": dx.device}
    if dbias is None or tiles.bias == "rows":
        partial = None if dbias is None else torch.empty(tiles.rows or 1, column_blocks, **sums)
        arguments = _arguments(tiles, blocks, stream, form)
        arguments["tensors"] = kernels.Backward(dy, x, bias, dx, partial)
        return [Launch(kernels.backward, (row_blocks * column_blocks,), arguments)]

    # Four rows at a time, and as few warps as span the columns: a thread then sums its own columns.
    _, columns, vector = blocks
    blocks = 4, columns, vector
    warps = max(1, columns // (32 * vector))
    row_blocks, column_blocks = _block_counts(tiles, blocks)
    # Eight tiles a program, so that the partial sums are a small part of the traffic, but no more programs
    # than 32 warps on each multiprocessor.
    most = 32 // warps * backend.multiprocessors(dx.device) // column_blocks
    programs = min(ceil_div(row_blocks, 8), max(1, most))
    partial = torch.empty(1, programs, tiles.columns, **sums)
    arguments = _arguments(tiles, blocks, stream, form)
    del arguments["tail"]  # rows of whole vectors
    arguments |= {"tensors": kernels.Backward(dy, x, bias, dx, partial[0]), "num_warps": warps}
    launch = Launch(kernels.backward_bias_columns, (column_blocks, programs), arguments)
    return [launch, sum_launch(partial, dbias)]


# --- operators, on tensors of any layout ------------------------------------------------------------------


@operator("fastreg::dropout", writes=["y"])
def _forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, stream: Stream, form: Form
) -> None:
    """y: laid out as ``dense(x)``; it may be x itself."""
    if x.numel() == 0:
        return
    x = tiled(x, form)
    result = y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype)
    residual = None if residual is None else with_strides(residual, x.stride())
    bias = None if bias is None else bias.contiguous()
    forward_launches.run(x, bias, residual, result, stream, form)
    if result is not y:
        y.copy_(result)


@operator("fastreg::dropout_backward", writes=["dx", "dbias"])
def _backward(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    dx: Tensor,
    dbias: Tensor | None,
    stream: Stream,
    form: Form,
) -> None:
    """x, bias: what forward had, where the activation needs them.

    dx: laid out as forward's y: the mask counts elements in that order, whatever the strides of dy.
    dbias: fp32 (fp64) [bias size].
    """
    if dy.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    result = tiled(dx, form)
    dy = with_strides(dy, result.stride())
    x = None if x is None else with_strides(x, result.stride())
    bias = None if bias is None else bias.contiguous()
    workspace = backward_launches.run(dy, x, bias, result, stream, form, dbias)
    if dbias is not None:
        tiles = _tiles(result, form)
        if tiles.bias == "rows":
            batches = (tiles.rows or 1) // (tiles.bias_size * tiles.bias_repeat)
            torch.sum(workspace[0].view(batches, tiles.bias_size, -1), (0, 2), out=dbias)
    if result is not dx:
        dx.copy_(result)


def activation_forward(z: Tensor, y: Tensor, activation: str) -> None:
    """y = f(z), in one pass: dropout that drops nothing. y may be z."""
    _forward(z, None, None, y, Stream(0), Form(0, 1.0, activation=activation))


def activation_backward(
    dy: Tensor, kept: Tensor, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """dz = dy f'(z) for y = f(z) ``[rows, columns]``, and if needed its sum over the rows (fp32): one pass.

    It is the backward pass of dropout that drops nothing. kept: z, or y where that is enough for f'.
    """
    form = Form(0, 1.0, bias_dim=1 if needs_bias else None, activation=derivative(activation))
    return _gradients(dy, kept, None, Stream(0), form, dense_strides(kept), kept.dtype, needs_bias)


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    stream: Stream,
    form: Form,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx, in this layout and dtype, and if needed the bias gradient, fp32 (fp64) [bias size]."""
    dx = empty_dense(dy.shape, stride, dtype, dy.device)
    dbias = None
    if needs_bias and form.bias_dim is not None:
        dbias = torch.empty(dy.shape[form.bias_dim], dtype=sum_dtype(dtype), device=dy.device)
    _backward(dy, x, bias, dx, dbias, stream, form)
    return dx, dbias


# --- autograd ---------------------------------------------------------------------------------------------


class _Dropout(torch.autograd.Function):
    """Saves the stream, and the input only where the activation needs it."""

    @staticmethod
    def forward(ctx, x, bias, residual, seed, offset, form, inplace):
        y = x if inplace else torch.empty_like(x, dtype=result_dtype(x.dtype, residual))
        if inplace:
            ctx.mark_dirty(x)
        stream = Stream(seed, offset)
        _forward(x, bias, residual, y, stream, form)
        ctx.stride, ctx.dtype, ctx.form = y.stride(), x.dtype, form
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        ctx.residual_dtype = None if residual is None else residual.dtype
        keep(ctx, stream, *((x, bias) if form.keeps_input else (None, None)))
        return y

    @staticmethod
    def backward(ctx, dy):
        stream, x, bias = kept(ctx)
        needs_x, needs_bias, needs_residual = ctx.needs_input_grad[:3]
        dx = dbias = dresidual = None
        if needs_x or needs_bias:
            gradients = _gradients_by_definition if needs_definition(dy) else _gradients
            dx, dbias = gradients(dy, x, bias, stream, ctx.form, ctx.stride, ctx.dtype, needs_bias)
            if dbias is not None:
                shape, dtype = ctx.bias_like
                dbias = dbias.view(shape).to(dtype)
        if needs_residual:
            dresidual = dy.to(ctx.residual_dtype)
        return dx, dbias, dresidual, None, None, None, None


def _gradients_by_definition(dy, x, bias, stream, form, stride, dtype, needs_bias):
    """``_gradients`` in ATen."""
    keep = _mask(dy.shape, stride, form, stream, dy.device) if form.threshold else None
    dx = _masked(dy.to(dtype), keep, form._replace(kept_shift=None))
    if form.activation is not None:
        dx, _ = by_definition(lambda x, b: _before_mask(x, b, form.activation), (x, bias), dx)
    if not needs_bias:
        return dx, None
    return dx, dx.sum([d for d in range(dx.dim()) if d != form.bias_dim])


# --- one function behind all public ones ------------------------------------------------------------------


def _dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    aten: Callable[[Tensor, float, bool, bool], Tensor],
    *,
    mask_dims: int = 0,
    alpha: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inverted: bool = True,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """aten: torch's own function for the plain, unseeded form: (input, p, training, inplace) -> output."""
    if type(p) is not float or type(training) is not bool or not 0.0 <= p <= 1.0:
        p = checked_p(input, p, training, F.dropout if aten is _aten_drop_path else aten)
    unfused = bias is None and activation is None and residual is None
    ours = backend.runs_kernels(input)
    seeded = random.is_wanted(seed, generator)
    if (
        unfused
        and inverted
        and not seeded
        and p < 1
        and not (ours and backend.worth_a_launch(input, "dropout"))
    ):
        return aten(input, p, training, inplace)

    # Dynamo does not look into a function that remembers.
    form_of = form_for.__wrapped__ if torch.compiler.is_compiling() else form_for
    form = form_of(p, training, inverted, alpha, mask_dims, activation)
    if unfused and form.threshold == 0 and form.scale == 1:
        return aten(input, p, False, inplace)
    if input.dim() < mask_dims:
        raise RuntimeError("a mask of samples needs a dimension of samples, but the input has none")
    if not unfused:
        check_activation(activation)
        bias, form = _checked_bias(input, bias, form)
        check_residual(input, residual)
        ours = ours and all(t is None or backend.is_plain(t) for t in (bias, residual))
    if inplace:
        _check_inplace(input, bias, residual, activation)

    stream = None
    if form.threshold == LANE_VALUES:
        stream, ours = Stream(0), False  # everything is dropped: nothing to draw, and nothing to read
    elif form.threshold and (ours or seeded):
        stream = random.stream(input.device, seed, generator)
    if ours:
        return _on_kernels(input, bias, residual, stream or Stream(0), form, inplace)
    if stream is None and form.threshold:
        y = aten(_before_mask(input, bias, activation), p, training, False)
        y = y if inverted else y * (1 - p)
        y = y if residual is None else y + residual
    else:
        y = _definition(input, bias, residual, stream, form)
    return input.copy_(y) if inplace else y


def _on_kernels(input, bias, residual, stream, form, inplace):
    if not torch.compiler.is_compiling():
        if inplace:
            _Dropout.apply(input, bias, residual, *stream, form, True)
            return input  # without gradients, apply returns an alias
        return apply(_Dropout, input, bias, residual, *stream, form, False)
    y = apply(_Dropout, input, bias, residual, *stream, form, False)
    return input.copy_(y) if inplace else y


@functools.lru_cache
def form_for(
    p: float,
    training: bool = True,
    inverted: bool = True,
    alpha: bool = False,
    mask_dims: int = 0,
    activation: str | None = None,
) -> Form:
    threshold = random.threshold(p)
    kept = (LANE_VALUES - threshold) / LANE_VALUES
    form = Form(threshold, 1.0, mask_dims=mask_dims, activation=activation)
    if not training:
        return form._replace(threshold=0, scale=1.0 if inverted else kept)
    if threshold in (0, LANE_VALUES) or not inverted:
        return form
    if not alpha:
        return form._replace(scale=1 / kept)
    # -lambda alpha of SELU. Not a global: with dynamic shapes, Dynamo takes those for inputs of the graph.
    saturation = -1.7580993408473766
    scale = 1 / math.sqrt((saturation**2 * (1 - kept) + 1) * kept)
    shift = -scale * saturation * (1 - kept)
    return form._replace(scale=scale, kept_shift=shift, dropped_value=scale * saturation + shift)


def _checked_bias(input: Tensor, bias: Tensor | None, form: Form) -> tuple[Tensor | None, Form]:
    """The bias, and the form with the one dimension of ``input`` that it varies along."""
    if bias is None:
        return None, form
    check_same_device(input, bias, "bias")
    sizes = (1,) * (input.dim() - bias.dim()) + tuple(bias.shape)
    varying = [d for d, size in enumerate(sizes) if size != 1]
    fits = input.dim() >= max(1, bias.dim()) and all(sizes[d] == input.shape[d] for d in varying)
    if not fits or len(varying) > 1:
        raise ValueError(
            "the bias has to be broadcastable to the input and vary along one dimension of it, "
            f"but got a bias of shape {tuple(bias.shape)} for an input of shape {tuple(input.shape)}"
        )
    if not varying:
        # A single value is a bias along the last dimension, whatever that is.
        bias = bias.reshape(1).expand(input.shape[-1])
        varying = [input.dim() - 1]
    return bias, form._replace(bias_dim=varying[0])


def _check_inplace(
    input: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> None:
    if torch.is_grad_enabled():
        check_leaf(input)
        if activation is not None and (input.requires_grad or (bias is not None and bias.requires_grad)):
            raise RuntimeError(
                f"inplace=True is not possible with activation={activation!r}: "
                "its gradient needs the input, which would be overwritten"
            )
    if residual is not None and result_dtype(input.dtype, residual) != input.dtype:
        raise RuntimeError(
            f"inplace=True is not possible with a residual of {residual.dtype}: the result does not fit {input.dtype}"
        )


# --- public functions -------------------------------------------------------------------------------------


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inverted: bool = True,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""Randomly zeroes elements of ``activation(input + bias)``, then adds ``residual``: one pass each way.

    In training every element is zeroed with probability ``p`` and the others are scaled by 1 / (1 - p); otherwise
    nothing is dropped. Drop-in for :func:`torch.nn.functional.dropout`. No mask is stored: the backward pass draws
    it again, and only an ``activation`` makes it keep the input.

    Args:
        input: floating point, any shape and strides. The result has its layout.
        p: probability of dropping, in [0, 1]. Applied to 2^-17, and the scale follows what is applied.
        training: apply dropout if True.
        inplace: write the result into ``input``. Refused where the gradient needs the input.
        bias: broadcastable to the input and varying along one dimension: ``[features]`` behind a linear layer,
            ``[channels, 1, 1]`` behind a convolution.
        activation: a name of ``fastreg.functional.ACTIVATIONS``, with torch's default parameters.
        residual: added to what the operation itself gives: after the dropout, or before the activation of a norm. Shape
            of the input; the result has the promoted dtype of both.
        inverted: False is the first form in the literature: nothing is scaled in training, and everything by
            1 - p otherwise.
        seed: int, or int64 tensor of one element: the mask is then that of :mod:`fastreg.random` on every device.
        generator: draws the seed, instead of torch's default generator.

    Raises:
        ValueError: p outside [0, 1]; unknown activation; bias or residual that do not fit; seed and generator.
        RuntimeError: in-place where that is not possible; tensors on several devices.

    Source: Hinton et al. 2012 (arXiv 1207.0580); Srivastava et al. 2014 (JMLR 15), whose section 10 scales in training.
    """
    return _dropout(
        input, p, training, inplace, F.dropout,
        bias=bias, activation=activation, residual=residual, inverted=inverted, seed=seed, generator=generator,
    )  # fmt: skip


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inverted: bool = True,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Zeroes whole channels of ``[N, C, L]`` or ``[C, L]``, each with probability ``p``, one draw a channel.

    Dropped channels are not read. Keyword arguments as in :func:`dropout`.
    Drop-in for :func:`torch.nn.functional.dropout1d`. Source: Tompson et al. 2015 (SpatialDropout, arXiv 1411.4280).
    """
    return _channel_dropout(
        input, p, training, inplace, F.dropout1d, input.dim() == 2, input.dim() == 3,
        bias=bias, activation=activation, residual=residual, inverted=inverted, seed=seed, generator=generator,
    )  # fmt: skip


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inverted: bool = True,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Zeroes whole channels of ``[N, C, H, W]``; ``[N, C, L]`` is taken with torch's warning.

    Arguments as in :func:`dropout`, dropped channels as in :func:`dropout1d`.
    """
    return _channel_dropout(
        input, p, training, inplace, F.dropout2d, False, input.dim() == 4,
        bias=bias, activation=activation, residual=residual, inverted=inverted, seed=seed, generator=generator,
    )  # fmt: skip


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inverted: bool = True,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Zeroes whole channels of ``[N, C, D, H, W]`` or ``[C, D, H, W]``.

    Arguments as in :func:`dropout`, dropped channels as in :func:`dropout1d`.
    """
    unbatched = input.dim() != 5
    expected = (input.dim() == 4) | (input.dim() == 5)  # "in" would ask a proxy of torch.fx for its value
    return _channel_dropout(
        input, p, training, inplace, F.dropout3d, unbatched, expected,
        bias=bias, activation=activation, residual=residual, inverted=inverted, seed=seed, generator=generator,
    )  # fmt: skip


def _channel_dropout(
    input, p, training, inplace, aten, unbatched, expected, inverted=True, alpha=False, **fused
):
    """unbatched: there is no dimension of samples. expected: torch takes such a rank. fused: other arguments."""
    unfused = inverted and all(value is None for value in fused.values())
    if unfused and not (backend.is_plain(input) and expected):
        return aten(input, p, training, inplace)
    if not expected:
        # torch's own warning or error about the rank, from torch: on a tensor without data.
        aten(torch.empty(input.shape, dtype=input.dtype, device="meta"), p, False)
    if not unbatched:
        return _dropout(
            input, p, training, inplace, aten, mask_dims=2, inverted=inverted, alpha=alpha, **fused
        )
    if fused.get("residual") is not None:
        fused["residual"] = fused["residual"].unsqueeze(0)
    y = _dropout(
        input.unsqueeze(0), p, training, inplace, _squeezed(aten), mask_dims=2, inverted=inverted, **fused
    )
    return input if inplace else y.squeeze(0)


def _squeezed(aten):
    return lambda input, *arguments: aten(input.squeeze(0), *arguments).unsqueeze(0)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Drops elements to the negative saturation of SELU and rescales, so that mean 0 and variance 1 stay.

    Keyword arguments as in :func:`dropout`. Drop-in for :func:`torch.nn.functional.alpha_dropout`.
    Source: Klambauer et al. 2017 (arXiv 1706.02515).
    """
    return _dropout(
        input, p, training, inplace, F.alpha_dropout, alpha=True,
        bias=bias, activation=activation, residual=residual, seed=seed, generator=generator,
    )  # fmt: skip


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """:func:`alpha_dropout` of whole channels of ``[N, C, ...]``. Drop-in for torch's ``feature_alpha_dropout``.

    Arguments as in :func:`dropout`, which has one form more: there is no ``inverted``.
    """
    return _channel_dropout(
        input, p, training, inplace, F.feature_alpha_dropout, False, input.dim() >= 2, alpha=True,
        bias=bias, activation=activation, residual=residual, seed=seed, generator=generator,
    )  # fmt: skip


def drop_path(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    inverted: bool = True,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Zeroes whole samples of ``[N, ...]``, each with probability ``p``: the branch of a residual network.

    ``drop_path(branch, p, residual=x)`` is the whole block's end, x + D(branch), in one pass; what is dropped is not
    read. Keyword arguments as in :func:`dropout`.
    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth" (arXiv 1603.09382); Larsson et al. 2017.
    """
    return _dropout(
        input, p, training, inplace, _aten_drop_path, mask_dims=1,
        bias=bias, activation=activation, residual=residual, inverted=inverted, seed=seed, generator=generator,
    )  # fmt: skip


def _aten_drop_path(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    if not training or p == 0:
        return input
    size = input.shape[:1] + (1,) * (input.dim() - 1)
    samples = torch.empty(size, dtype=input.dtype, device=input.device)
    keep = torch.bernoulli(samples, 1 - p).div_(1 - p)  # drawn out of place, as vmap wants it
    return input.mul_(keep) if inplace else input * keep
