"""Local response normalization, fused with residual and activation: y = f(LRN(x) + residual).

Two backends: the Triton kernels of ``kernels/local_response_norm.py`` (CUDA) and the definition, which is torch's own
function (CPU, ``torch.func`` transforms, second derivatives). Neither saves more than the input and, where the
activation needs it, the residual.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.arguments import is_integer, is_number, plain
from fastreg.ops.backend import Launch
from fastreg.ops.fused import activated, check_activation, check_residual, result_dtype
from fastreg.ops.layout import ceil_div, dense, with_strides

if backend.HAS_TRITON:
    from fastreg.kernels import local_response_norm as kernels

WIDEST = 16
"""Windows that reach over more channels go to ATen: a thread of the kernels holds a whole window in registers."""


class _Form(NamedTuple):
    """What distinguishes one normalization from another: y = f(x (k + alpha/size sum x^2)^-beta + residual)."""

    size: int
    alpha: float
    beta: float
    k: float
    activation: str | None = None


def _definition(x: Tensor, residual: Tensor | None, form: _Form) -> Tensor:
    return activated(F.local_response_norm(x, *form[:4]), form.activation, residual)


# --- the launch -------------------------------------------------------------------------------------------


def _window(channels: int, size: int) -> tuple[int, int]:
    """How many channels before and behind its own a window reaches over."""
    return min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)


def _runs_kernels(x: Tensor, form: _Form) -> bool:
    """Whether the kernels can do it. What they leave to ATen: all that torch refuses; windows wider than WIDEST; and
    parameters with which the denominator may be 0 or negative, or its power is of no use."""
    return (
        backend.runs_kernels(x)
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


def _launch(kernel, tensors: dict[str, Tensor | None], x: Tensor, form: _Form) -> Launch:
    """x, tensors: dense, with one layout."""
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
        tensors
        | {
            "scale": form.alpha / form.size,
            "beta": float(form.beta),
            "k": float(form.k),
            "samples": samples,
            "channel_vectors": channels // vector if last else channels,
            "inner_vectors": 1 if last else inner // vector,
            "BEFORE": before,
            "AFTER": after,
            "THREE_QUARTERS": form.beta == 0.75,
            "ACTIVATION": form.activation,
            "CHANNELS": block,
            "ROWS": rows,
            "VECTOR": vector,
            "LAST": last,
            "WIDE": x.numel() >= 1 << 31,
            "num_warps": warps,
        },
    )


def _forward_launch(x: Tensor, residual: Tensor | None, y: Tensor, form: _Form) -> Launch:
    return _launch(kernels.forward, {"x_ptr": x, "residual_ptr": residual, "y_ptr": y}, x, form)


def _backward_launch(
    dy: Tensor, x: Tensor, residual: Tensor | None, dx: Tensor, dresidual: Tensor | None, form: _Form
) -> Launch:
    tensors = {"dy_ptr": dy, "x_ptr": x, "residual_ptr": residual, "dx_ptr": dx, "dresidual_ptr": dresidual}
    return _launch(kernels.backward, tensors, x, form)


def _run_forward(x: Tensor, residual: Tensor | None, form: _Form) -> Tensor:
    """The forward kernel on tensors of any layout. Returns a dense tensor in the order of x."""
    x = dense(x)
    y = torch.empty_strided(x.shape, x.stride(), dtype=result_dtype(x.dtype, residual), device=x.device)
    residual = None if residual is None else with_strides(residual, x.stride())
    _forward_launch(x, residual, y, form).run(x.device)
    return y


def _run_backward(
    dy: Tensor, x: Tensor, residual: Tensor | None, form: _Form, needs_residual: bool
) -> tuple[Tensor, Tensor | None]:
    """The backward kernel on tensors of any layout. residual: forward's, where the activation needs it."""
    x = dense(x)
    dy = with_strides(dy, x.stride())
    residual = None if residual is None else with_strides(residual, x.stride())
    dx = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    dresidual = None
    if needs_residual:
        dresidual = torch.empty_strided(x.shape, x.stride(), dtype=residual.dtype, device=x.device)
    _backward_launch(dy, x, residual, dx, dresidual, form).run(x.device)
    return dx, dresidual


# --- autograd, eager --------------------------------------------------------------------------------------


class _LocalResponseNorm(torch.autograd.Function):
    """The eager path to the kernels."""

    @staticmethod
    def forward(ctx, x, residual, form):
        ctx.form = form
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(x, residual if form.activation is not None else None)
        return _run_forward(x, residual, form)

    @staticmethod
    def backward(ctx, dy):
        x, residual = ctx.saved_tensors
        needs_x, needs_residual, _ = ctx.needs_input_grad
        through_kernel = needs_residual and residual is not None  # else it is dy itself
        dx = dresidual = None
        if needs_x or through_kernel:
            # Not on the kernels: second derivatives, and batched gradients (vmap).
            if torch.is_grad_enabled() or not backend.runs_kernels(dy):
                dx, dresidual = _differentiable_backward(dy, x, residual, ctx.form, needs_x, through_kernel)
            else:
                dx, dresidual = _run_backward(dy, x, residual, ctx.form, through_kernel)
        if needs_residual and not through_kernel:
            dresidual = dy.to(ctx.residual_dtype)
        return dx if needs_x else None, dresidual, None


def _differentiable_backward(dy, x, residual, form, needs_x, needs_residual):
    """``_run_backward`` in ATen, for second derivatives (create_graph=True) and batched gradients."""
    create_graph = torch.is_grad_enabled()
    inputs = [t for t, needed in ((x, needs_x), (residual, needs_residual)) if needed]
    with torch.enable_grad():
        # torch's function takes views that not every layout of five dimensions has.
        y = _definition(x.contiguous() if x.dim() > 4 else x, residual, form)
    gradients = iter(torch.autograd.grad(y, inputs, dy.to(y.dtype), create_graph=create_graph))
    return next(gradients) if needs_x else None, next(gradients) if needs_residual else None


# --- registered operators, for torch.compile --------------------------------------------------------------
# Dynamo meets these; an eager call does not pay for the dispatcher.


@torch.library.custom_op("fastreg::local_response_norm", mutates_args=())
def _local_response_norm_op(
    x: Tensor,
    residual: Tensor | None,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    activation: str | None,
) -> Tensor:
    return _run_forward(x, residual, _Form(size, alpha, beta, k, activation))


@_local_response_norm_op.register_fake
def _(x, residual, *form):
    return torch.empty_like(x, dtype=result_dtype(x.dtype, residual))


@torch.library.custom_op("fastreg::local_response_norm_backward", mutates_args=())
def _local_response_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    activation: str | None,
    needs_residual: bool,
) -> tuple[Tensor, Tensor]:
    dx, dresidual = _run_backward(dy, x, residual, _Form(size, alpha, beta, k, activation), needs_residual)
    return dx, dy.new_empty(0) if dresidual is None else dresidual


@_local_response_norm_backward_op.register_fake
def _(dy, x, residual, size, alpha, beta, k, activation, needs_residual):
    dx = torch.empty_like(x)
    return dx, torch.empty_like(x, dtype=residual.dtype) if needs_residual else dy.new_empty(0)


def _save_for_compiled_backward(ctx, inputs, output):
    x, residual, *fields = inputs
    ctx.form = form = _Form(*fields)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, residual if form.activation is not None else None)


def _compiled_backward(ctx, dy):
    x, residual = ctx.saved_tensors
    needs_x, needs_residual, *_ = ctx.needs_input_grad
    through_kernel = needs_residual and residual is not None
    dx = dresidual = None
    if needs_x or through_kernel:
        dx, dresidual = _local_response_norm_backward_op(dy, x, residual, *ctx.form, through_kernel)
    if not through_kernel:
        dresidual = dy.to(ctx.residual_dtype) if needs_residual else None
    return dx if needs_x else None, dresidual, *[None] * len(ctx.form)


_local_response_norm_op.register_autograd(_compiled_backward, setup_context=_save_for_compiled_backward)


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
        activation: one of ``ACTIVATIONS``, with torch's default parameters.
        residual: shape of the input. The result has the promoted dtype of both.

    Raises:
        ValueError: fewer than three dimensions; unknown activation; a residual of another shape.
        RuntimeError: tensors on several devices.

    Source: Krizhevsky, Sutskever and Hinton 2012, section 3.3 (NeurIPS 25), with alpha / size for their alpha.
    """
    check_activation(activation)
    check_residual(input, residual)
    whole = plain(size)
    form = _Form(whole if is_integer(whole) else size, alpha, beta, k, activation)
    if not _runs_kernels(input, form):
        return _definition(input, residual, form)
    if torch.compiler.is_compiling():
        return _local_response_norm_op(input, residual, *form)
    return _LocalResponseNorm.apply(input, residual, form)
