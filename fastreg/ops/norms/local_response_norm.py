"""Local response normalization, fused with residual and activation: y = f(LRN(x) + residual).

Two backends: the Triton kernels of ``kernels/local_response_norm.py`` (CUDA) and the definition, which is torch's own
function (CPU, ``torch.func`` transforms, second derivatives). Neither saves more than the input and, where the
activation needs it, the residual.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.arguments import is_integer, is_number, plain
from fastreg.ops.backend import Launch
from fastreg.ops.checks import check_activation, check_residual
from fastreg.ops.fused import activated, result_dtype
from fastreg.ops.launch import planned
from fastreg.ops.layout import ceil_div, dense, with_strides
from fastreg.ops.operator import apply, by_definition, needs_definition, operator

if backend.HAS_TRITON:
    from fastreg.kernels import local_response_norm as kernels

WIDEST = 16
"""Windows that reach over more channels go to ATen: a thread of the kernels holds a whole window in registers."""


class Form(NamedTuple):
    """What distinguishes one normalization from another: y = f(x (k + alpha/size sum x^2)^-beta + residual)."""

    size: int
    alpha: float
    beta: float
    k: float
    activation: str | None = None


def _is_viewable_in_one(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether neighbouring dimensions lie in memory like a single one."""
    several = [(n, s) for n, s in zip(shape, stride, strict=True) if n != 1]
    return all(s == n_next * s_next for (_, s), (n_next, s_next) in itertools.pairwise(several))


def _definition(x: Tensor, residual: Tensor | None, form: Form) -> Tensor:
    if not _is_viewable_in_one(x.shape[3:], x.stride()[3:]):
        x = x.contiguous()  # torch views these dimensions as one, and raises where it cannot
    return activated(F.local_response_norm(x, *form[:4]), form.activation, residual)


# --- the launch -------------------------------------------------------------------------------------------


def _window(channels: int, size: int) -> tuple[int, int]:
    """How many channels before and behind its own a window reaches over."""
    return min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)


def _runs_kernels(x: Tensor, residual: Tensor | None, form: Form) -> bool:
    """Whether the kernels can do it. What they leave to ATen: all that torch refuses; windows wider than WIDEST; and
    parameters with which the denominator may be 0 or negative, or its power is of no use."""
    return (
        backend.runs_kernels(x)
        and (residual is None or backend.goes_with(residual, x))
        and x.dim() >= 3
        and x.numel() > 0
        and is_integer(form.size)
        and form.size >= 1
        and all(map(is_number, form[1:4]))  # tensors are for torch: they may have gradients
        and sum(_window(x.shape[1], form.size)) < WIDEST
        and form.alpha >= 0
        and form.k > 1e-37  # the kernels flush denormal numbers to 0
        and form.beta != 0
    )


def _launch(kernel, tensors: Any, x: Tensor, form: Form) -> Launch:
    """tensors: the kernel's, like x dense, with one layout."""
    channels = x.shape[1]
    inner = x.stride(1) if channels > 1 else x.numel()
    last = inner == 1
    samples = x.numel() // (channels * inner)
    before, after = _window(channels, form.size)

    vector = math.gcd(16 // x.element_size(), channels if last else inner)
    if not last:
        # A thread holds windows of every position of a vector: what fits in its registers.
        most = 8 if before + after < 8 else 4
        most //= (1 if kernel is kernels.forward else 2) * max(1, x.element_size() // 4)
        vector = min(vector, max(1, most))
    # 16 channels, or a little less where that leaves no block partly empty.
    blocks = ceil_div(channels, 16)
    block = ceil_div(channels, blocks)
    if last:
        block = ceil_div(block, vector) * vector
        blocks = ceil_div(channels, block)
    # Programs of one warp while those of four would not fill a GPU. (An estimate, to be replaced by a measurement.)
    warps = 4 if x.numel() >= 1 << 22 else 1
    rows = 32 * warps * (2 if vector == 1 and not last else 1)
    vectors = samples * (inner // vector)  # of positions
    return Launch(
        kernel,
        (ceil_div(samples * blocks, rows) if last else ceil_div(vectors, rows) * blocks,),
        {
            "tensors": tensors,
            "scale": form.alpha / form.size,
            "beta": float(form.beta),
            "k": float(form.k),
            "view": kernels.View(
                samples, channels // vector if last else channels, 1 if last else inner // vector
            ),
            "plan": kernels.Plan(
                before=before,
                after=after,
                three_quarters=form.beta == 0.75,
                activation=form.activation,
                channels=block,
                rows=rows,
                vector=vector,
                last=last,
                wide=x.numel() >= 1 << 31,
            ),
            "num_warps": warps,
        },
    )


@planned
def forward_launches(x: Tensor, residual: Tensor | None, y: Tensor, form: Form) -> list[Launch]:
    return [_launch(kernels.forward, kernels.Forward(x, residual, y), x, form)]


@planned
def backward_launches(
    dy: Tensor, x: Tensor, residual: Tensor | None, dx: Tensor, dresidual: Tensor | None, form: Form
) -> list[Launch]:
    return [_launch(kernels.backward, kernels.Backward(dy, x, residual, dx, dresidual), x, form)]


# --- operators, on tensors of any layout ------------------------------------------------------------------


@operator("fastreg::local_response_norm", writes=["y"])
def _forward(x: Tensor, residual: Tensor | None, y: Tensor, form: Form) -> None:
    """y: laid out as ``dense(x)``."""
    if x.numel():
        x = dense(x)
        residual = None if residual is None else with_strides(residual, x.stride())
        forward_launches.run(x, residual, y, form)


@operator("fastreg::local_response_norm_backward", writes=["dx", "dresidual"])
def _backward(
    dy: Tensor, x: Tensor, residual: Tensor | None, dx: Tensor, dresidual: Tensor | None, form: Form
) -> None:
    """residual: forward's, where the activation needs it. dx, dresidual: laid out as ``dense(x)``."""
    if x.numel():
        x = dense(x)
        residual = None if residual is None else with_strides(residual, x.stride())
        backward_launches.run(with_strides(dy, x.stride()), x, residual, dx, dresidual, form)


# --- autograd ---------------------------------------------------------------------------------------------


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, form):
        y = torch.empty_like(x, dtype=result_dtype(x.dtype, residual))
        _forward(x, residual, y, form)
        ctx.form = form
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(x, residual if form.activation is not None else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, residual = ctx.saved_tensors
        needs_x, needs_residual, _ = ctx.needs_input_grad
        through_kernel = needs_residual and residual is not None  # else it is dy itself
        dx = dresidual = None
        if needs_x or through_kernel:
            gradients = _gradients_by_definition if needs_definition(dy) else _gradients
            dx, dresidual = gradients(dy, x, residual, ctx.form, through_kernel)
        if needs_residual and not through_kernel:
            dresidual = dy.to(ctx.residual_dtype)
        return dx if needs_x else None, dresidual, None


def _gradients(dy, x, residual, form, needs_residual):
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x, dtype=residual.dtype) if needs_residual else None
    _backward(dy, x, residual, dx, dresidual, form)
    return dx, dresidual


def _gradients_by_definition(dy, x, residual, form, needs_residual):
    def definition(x, residual):
        # torch's function takes views that not every layout of five dimensions has.
        x = x.contiguous() if x.dim() > 4 else x
        return _definition(x, residual, form).to(dy.dtype)

    return by_definition(definition, (x, residual), dy)


# --- the public function ----------------------------------------------------------------------------------


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(input / (k + alpha mean of input² over ``size`` neighbouring channels)^beta + residual).

    Drop-in for :func:`torch.nn.functional.local_response_norm`; the keyword arguments are fused into the same pass.

    Args:
        input: ``[N, C, *]`` of three dimensions or more, in any dense layout (others cost a copy).
        size: channels of a window, centred on its own. An even one reaches one further back than forward.
        alpha, beta, k: as in the formula. Channels outside the tensor count as zeros in the mean.
        activation: a name of ``fastreg.functional.ACTIVATIONS``, with torch's default parameters.
        residual: added to what the operation itself gives: after the dropout, or before the activation of a norm. Shape
            of the input; the result has the promoted dtype of both.

    Raises:
        ValueError: fewer than three dimensions; unknown activation; a residual of another shape.
        RuntimeError: tensors on several devices.

    Source: Krizhevsky, Sutskever and Hinton 2012, section 3.3 (NeurIPS 25), with alpha / size for their alpha.
    """
    check_activation(activation)
    check_residual(input, residual)
    whole = plain(size)
    form = Form(whole if is_integer(whole) else size, alpha, beta, k, activation)
    if not _runs_kernels(input, residual, form):
        return _definition(input, residual, form)
    return apply(_LocalResponseNorm, input, residual, form)
