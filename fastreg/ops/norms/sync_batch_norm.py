"""Batch normalization over the batches of several processes: y = f(BN(x) + residual).

Each pass has one collective. Forward, every process gathers [2C + 1] values of each: mean and (biased) variance of
its channels, and how many values these are of; they are merged with the formula of Chan, Golub and LeVeque, in which
an empty batch weighs nothing. Backward, [2, C] sums are reduced. Nothing waits for the GPU: counts stay there.

    forward     statistics -> merge_statistics -> all_gather -> merge_statistics (running statistics) -> apply
    backward    gradient_sums -> sum -> all_reduce -> merge_gradient_sums -> gradient_apply

on the kernels of ``kernels/channel_norm/``, or the same in ATen. Processes may differ in which of the two they take.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from fastreg.ops import backend
from fastreg.ops.arguments import number
from fastreg.ops.checks import check_activation, check_residual
from fastreg.ops.fused import activated, result_dtype, sum_dtype
from fastreg.ops.layout import dense_strides, with_strides
from fastreg.ops.norms.batch_norm import batch_norm
from fastreg.ops.norms.channel_norm import (
    Form,
    Gradients,
    Running,
    dx_launch,
    forward_arguments,
    forward_with,
    gradient_sums_launch,
    keeps_signs,
    merge_gradients_launch,
    merge_statistics_launch,
    plain_momentum,
    statistics_launches,
    takes,
    unpacked_signs,
)
from fastreg.ops.norms.lines import View, viewed
from fastreg.ops.operator import by_definition

if backend.HAS_TRITON:
    from fastreg.kernels import channel_norm as kernels

SLOPES = {"relu": 0.0, "leaky_relu": 0.01}
"""Derivative of the activations whose signs are kept, where those are not positive."""


def _channels(x: Tensor) -> View:
    """One line a channel: how the kernels that merge see values of channels."""
    return View(False, 1, x.shape[1], 1, 1, x.shape[1], 1)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` [C], to be broadcast over ``x`` [N, C, ...], in the dtype of its sums."""
    return values.to(sum_dtype(x.dtype)).view(-1, *[1] * (x.dim() - 2))


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [dim for dim in range(x.dim()) if dim != 1]


# --- statistics -------------------------------------------------------------------------------------------


def _local_statistics(x: Tensor, on_kernels: bool) -> Tensor:
    """[2C + 1]: means, biased variances, and the number of values of a channel; zeros for an empty batch."""
    channels, dtype = x.shape[1], sum_dtype(x.dtype)
    count = x.numel() // channels
    own = torch.full((2 * channels + 1,), float(count), dtype=dtype, device=x.device)
    if on_kernels:
        x, seen = viewed(x, 0)
        for launch in statistics_launches(x, own[:channels], own[channels:-1], None, seen):
            launch.run(x.device)
    elif count > 0:
        var, mean = torch.var_mean(x.to(dtype), _others(x), correction=0)
        own = torch.cat([mean, var, own[-1:]])
    return own


def _gathered(own: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """``own`` of every process [processes, size]."""
    # torch 2.13 renamed all_gather_into_tensor. Gloo takes flat tensors only.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    every = own.new_empty(dist.get_world_size(group) * own.numel())
    gather(every, own, group=group)
    return every.view(-1, own.numel())


def _merged(x: Tensor, every: Tensor, running: Running) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance [C] and number of values [1] of all processes. Updates ``running``."""
    # The fullest batch first: deviations from its mean are summed, and an empty batch has none.
    counts, order = every[:, -1].sort(descending=True, stable=True)
    means, variances = every[:, :-1].view(counts.numel(), 2, -1).transpose(0, 1).index_select(1, order)
    counts[:1].clamp_(min=1)  # nothing is divided by 0 where all batches are empty
    total = counts.sum(0, keepdim=True)
    if backend.runs_kernels(x):  # also where this process has an empty batch: the same bits on all
        mean, var = every.new_empty(2, x.shape[1])
        merge_statistics_launch((means, variances, counts), mean, var, running, _channels(x)).run(x.device)
        # The kernel wrote into them: whoever saved them for a backward pass has to hear of it.
        torch.autograd.graph.increment_version([t for t in running[:2] if t is not None])
        return mean, var, total
    share = (counts / total)[:, None]
    deviation = torch.where(counts[:, None] > 0, means - means[0], 0.0)
    off = (share * deviation).sum(0)
    mean = means[0] + off
    var = (share * (variances + (deviation - off).square())).sum(0)
    for old, new in ((running.mean, mean), (running.var, var * (total / (total - 1)))):
        if old is not None:
            updated = (1 - running.momentum) * old + running.momentum * new
            old.copy_(torch.where(total > 1, updated, old))  # fewer values have no variance
    return mean, var, total


# --- the definition, in ATen ------------------------------------------------------------------------------


def _normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(torch.rsqrt(var + eps), x)


def _scaled(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    v = normalized if weight is None else normalized * _per_channel(weight, normalized)
    return v if bias is None else v + _per_channel(bias, normalized)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes, which each of them gets: so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, own, group):
        ctx.group = group
        total = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _AllReduce.apply(gradient, ctx.group), None


def _definition(x, weight, bias, residual, near, total, form, group) -> Tensor:
    """The forward pass in differentiable operations: two collectives, one after the other.

    near: about the mean [C], a constant, from which deviations are summed.
    """
    x = x.to(sum_dtype(x.dtype)) - _per_channel(near, x)
    mean = _AllReduce.apply(x.sum(_others(x)), group) / total
    deviation = x - _per_channel(mean, x)
    var = _AllReduce.apply(deviation.square().sum(_others(x)), group) / total
    normalized = deviation * _per_channel(torch.rsqrt(var + form.eps), x)
    return activated(_scaled(normalized, weight, bias), form.activation, residual)


def _gradients_by_definition(dy, x, weight, bias, residual, mean, total, form, group):
    """Gradients of x, weight, bias and residual, themselves differentiable (create_graph=True)."""

    def y(x, weight, bias, residual):
        return _definition(x, weight, bias, residual, mean, total, form, group).to(dy.dtype)

    return by_definition(y, (x, weight, bias, residual), dy)


def _aten_backward(dy, x, weight, bias, residual, mean, var, total, form, group):
    """The same by the formula of ``kernels/channel_norm/elementwise.py``, whose two sums are those of all processes."""
    dims, rstd = _others(x), torch.rsqrt(var + form.eps)
    deviation = x.to(mean.dtype) - _per_channel(mean, x)
    dv = dy
    if form.activation is not None:
        with torch.enable_grad():
            v = _scaled(deviation * _per_channel(rstd, x), weight, bias)
            v = (v if residual is None else v + residual).detach().requires_grad_()
            y = activated(v, form.activation)
            (dv,) = torch.autograd.grad(y, v, dy.to(y.dtype))
    g = dv.to(mean.dtype)
    sums = torch.stack([g.sum(dims), (g * deviation).sum(dims)])  # as the kernels': others may run those
    dbias, dweight = sums[0].clone(), sums[1] * rstd
    dist.all_reduce(sums, group=group)
    b, w = (sums / total).unbind()
    dx = g - _per_channel(b, x) - deviation * _per_channel(w * rstd.square(), x)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    return (dx * _per_channel(scale, x)).to(x.dtype), dweight, dbias, dv


# --- the kernels ------------------------------------------------------------------------------------------


def _kernel_backward(dy, x, weight, bias, residual, signs, mean, var, total, form, group, dv_dtype, needs_dx):
    """dv_dtype: of the residual's gradient, where an activation makes it another than dy; else None.

    Returns dx (or None), the gradients of weight and bias (fp32 or fp64), and that of the residual.
    """
    result = torch.empty_like(x)
    channels = _channels(x)
    x, seen = viewed(x, 0)
    dy = with_strides(dy, x.stride())
    residual = None if residual is None else with_strides(residual, x.stride())
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    dv = None if dv_dtype is None else torch.empty_like(x, dtype=dv_dtype)
    forward = forward_arguments(weight, bias, mean, var, form)
    tensors = kernels.Backward(dy, x, residual, signs)
    launch, partials = gradient_sums_launch(tensors, kernels.Gradients(None, dv), forward, form, seen)
    launch.run(x.device)
    both = partials.view(2, -1, seen.channels, seen.repeat).sum((1, 3))

    dx = result if result.stride() == x.stride() else torch.empty_like(x)
    dweight, dbias = torch.empty_like(both)
    own = Gradients(dx, dweight, dbias, dv)
    merge_gradients_launch(both, var, weight, own, None, 0.0, form, channels).run(x.device)
    dist.all_reduce(both, group=group)
    if not needs_dx:
        return None, own.dweight, own.dbias, dv

    means = torch.empty_like(both)
    ignored = torch.empty_like(both)
    everyones = Gradients(dx, ignored[0], ignored[1], None)
    merge_gradients_launch(both, var, weight, everyones, means, total, form, channels).run(x.device)
    if dv is None:
        dx_launch(dy, x, dx, means, forward, form.activation, seen).run(x.device)
    else:  # what the sums were taken of: no activation any more
        dx_launch(dv, x, dx, means, forward, None, seen).run(x.device)
    return result if dx is result else result.copy_(dx), own.dweight, own.dbias, dv


# --- autograd ---------------------------------------------------------------------------------------------


class _SyncBatchNorm(torch.autograd.Function):
    """Saves x, a mean and a variance a channel, the number of values, and what the activation needs."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, running, form, group):
        on_kernels = takes(x, weight, bias, (None, None), 0, fused=True)
        mean, var, total = _merged(x, _gathered(_local_statistics(x, on_kernels), group), running)
        dtype, signs = result_dtype(x.dtype, residual), None
        if on_kernels:
            y = torch.empty_like(x, dtype=dtype)
            if any(ctx.needs_input_grad) and keeps_signs(residual, form, y):
                signs = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
            forward_with(x, weight, bias, residual, y, signs, mean, var, form)
        else:
            v = _scaled(_normalized(x, mean, var, form.eps), weight, bias)
            y = activated(v, form.activation, residual).to(dtype)
        ctx.form, ctx.group = form, group
        ctx.residual_dtype = None if residual is None else residual.dtype
        again = residual if form.activation is not None and signs is None else None
        ctx.save_for_backward(x, weight, bias, again, signs, mean, var, total)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, residual, signs, mean, var, total = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        form, differentiable = ctx.form, torch.is_grad_enabled()
        fused = ctx.residual_dtype is not None and form.activation is not None
        own = fused and needs_residual
        # Whatever is wanted here, others may want dx: every backward pass takes part in the collective.
        if (
            not differentiable
            and backend.runs_kernels(dy)
            and takes(x, weight, bias, (None, None), 0, fused=True)
        ):
            dx, dweight, dbias, dv = _kernel_backward(
                dy, x, weight, bias, residual, signs, mean, var, total, form, ctx.group,
                ctx.residual_dtype if fused and (needs_residual or needs_x) else None, needs_x,
            )  # fmt: skip
        else:
            if signs is not None:
                positive = unpacked_signs(signs, x.shape, dense_strides(x))
                dy = torch.where(positive, dy, dy * SLOPES[form.activation])
                form = form._replace(activation=None)
            if differentiable:
                dx, dweight, dbias, dv = _gradients_by_definition(
                    dy, x, weight, bias, residual, mean, total, form, ctx.group
                )
            else:
                dx, dweight, dbias, dv = _aten_backward(
                    dy, x, weight, bias, residual, mean, var, total, form, ctx.group
                )
            dv = dy if signs is not None else dv
        return (
            dx if needs_x else None,
            dweight.to(weight.dtype) if needs_weight else None,
            dbias.to(bias.dtype) if needs_bias else None,
            (dv if own else dy).to(ctx.residual_dtype) if needs_residual else None,
            *[None] * 3,
        )


# --- the public function ----------------------------------------------------------------------------------


def _check(input: Tensor, **channel_values: Tensor | None) -> None:
    """As torch's batch_norm, before a process that fails could leave others waiting."""
    if not input.is_floating_point():
        raise NotImplementedError(f"batch normalization is not implemented for {input.dtype}")
    if input.shape[1] == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    for name, values in channel_values.items():
        if values is not None and values.numel() != input.shape[1]:
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {values.numel()}")


def _synchronized(input, weight, bias, residual, running, form, group) -> Tensor:
    return _SyncBatchNorm.apply(input, weight, bias, residual, running, form, group)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    group: "dist.ProcessGroup | None" = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`fastreg.functional.batch_norm` whose batch, in training, is that of all processes of ``group`` together.

    Every process of the group has to call it, and its backward pass where any of them does; each with a batch of any
    size, also of none. Gradients of weight and bias are those of the own batch, as DistributedDataParallel averages
    them. Second derivatives work (with more collectives). There is no communication in evaluation, nor in a group of
    one. ``torch.compile`` breaks its graph here, as at torch's own.

    Args:
        input: floating point ``[N, C, *]``, any strides, of one dtype on all processes. The result has its layout.
        running_mean, running_var: ``[C]``, or None in training. Updated with the statistics of all processes.
        weight, bias: ``[C]``, or None.
        group: the processes; None: all. CPU tensors go with gloo.
        momentum, eps, activation, residual: as in ``batch_norm``.

    Raises:
        ValueError: one value per channel in training, where this process is alone. (How many there are in a group is
            known on the GPU only: a single one leaves the running statistics alone, and gives ``f(bias + residual)``.)
        RuntimeError: values of another number of channels than the input has.
        Else what ``batch_norm`` raises.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); merging: Chan, Golub and LeVeque 1983.
    """
    if training and dist.is_available() and dist.is_initialized():
        group = group or dist.group.WORLD
        if dist.get_world_size(group) > 1:
            check_activation(activation)
            check_residual(input, residual)
            _check(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
            part = plain_momentum(momentum, input)
            running = Running(
                running_mean, running_var, number("momentum", momentum) if part is None else part
            )
            form = Form(0, number("eps", eps), activation)
            function = _synchronized
            if torch.compiler.is_compiling():
                function = torch.compiler.disable(function)
            return function(input, weight, bias, residual, running, form, group)
    return batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        activation=activation, residual=residual,
    )  # fmt: skip
